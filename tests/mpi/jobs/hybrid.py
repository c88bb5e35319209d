"""Models that are split over ranks, alone and with replicas; the argument says which. Prints it and the rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "mpi_examples"))
import hybrid
from tiny_gpt import Stage, TinyGPT, mean_loss

import sparsecomm as sc

STEPS, RATE, BATCH = 5, 0.5, 8
Split = Callable[[TinyGPT, DeviceMesh, sc.SparseConfig], tuple[hybrid.Part, sc.SparseState]]


def whole_model() -> TinyGPT:
    torch.manual_seed(5)
    return TinyGPT(length=16, width=32)


def batch(step: int, replica: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 8, (BATCH, 17), generator=torch.Generator().manual_seed(100 * step + replica))
    return text[:, :-1], text[:, 1:]


def losses_alone(replicas: int) -> list[list[float]]:
    """One process that trains on the batches of all replicas; returns the loss of each, by step."""
    model, found = whole_model(), []
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [model(*batch(step, replica)) for replica in range(replicas)]
        torch.stack(losses).mean().backward()
        optimizer.step()
        found.append([float(loss.detach()) for loss in losses])
    return found


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model"))


def train(part: hybrid.Part, mesh: DeviceMesh, after_step: Callable[[], None] = lambda: None) -> list[float]:
    """Returns this rank's losses; 0.0 where it does not know them."""
    optimizer, found = torch.optim.SGD([*part.own.values(), *part.shared.values()], RATE, foreach=False), []
    for step in range(STEPS):
        optimizer.zero_grad()
        found.append(part.gradients(*batch(step, mesh.get_local_rank("data"))))
        after_step()
        optimizer.step()
    return found


def everyones(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors of all ranks of a group, one a row."""
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor, group=group)
    return torch.stack(rows)


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([torch.zeros(0), *(t.detach().reshape(-1) for t in tensors)])


# --- density 1 --------------------------------------------------------------------------------------------------------


def is_one_process(split: Split) -> None:
    """With density 1, the losses are those of one process."""
    mesh = grid()
    options = sc.SparseConfig(compressor=sc.TopK(1.0), collective="allgather", value_codec="fp32")
    part, _ = split(whole_model(), mesh, options)
    found = train(part, mesh)
    expected = [losses[mesh.get_local_rank("data")] for losses in losses_alone(mesh["data"].size())]
    if mesh.get_local_rank("model") == 1:  # in a pipeline, the last stage alone knows the loss
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 2e-5, (found, expected)
    assert expected[-1] < expected[0] - 0.2, "training changes the loss by more than rounding"


def tensors_dense() -> None:
    is_one_process(hybrid.split_tensors)


def layers_dense() -> None:
    is_one_process(hybrid.split_layers)


# --- sparse -----------------------------------------------------------------------------------------------------------


class Books:
    """What enters the averages of this rank's part: it takes the place of our hook and of `allreduce_gradients`."""

    def __init__(self) -> None:
        self.given: dict[int, Tensor] = {}  # by id of the parameter
        self._hook, self._by_hand = sc.sparse_hook, sc.allreduce_gradients

    def hook(self, state: Any, bucket: Any) -> Any:
        for p, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.given[id(p)] = gradient.clone()
        return self._hook(state, bucket)

    def by_hand(self, model: nn.Module, state: sc.SparseState) -> None:
        self.given = {id(p): p.grad.clone() for p in model.parameters()}
        self._by_hand(model, state)


def kept(state: sc.SparseState, part: hybrid.Part) -> Tensor:
    """This rank's residual of its part."""
    saved = state.state_dict()
    return flat([saved[f"residual.{name}"] for name in part.own])


def keep_books(split: Split) -> None:
    """Each part loses nothing in any step; its copies, and what all ranks share, have the same bits."""
    mesh, books = grid(), Books()
    with pytest.MonkeyPatch.context() as patch:
        # DDP accepts no annotations that are strings.
        patch.setattr(sc, "sparse_hook", lambda state, bucket: books.hook(state, bucket))
        patch.setattr(sc, "allreduce_gradients", books.by_hand)
        check_books(split, mesh, books)


def check_books(split: Split, mesh: DeviceMesh, books: Books) -> None:
    column = mesh["data"].get_group()
    part, state = split(whole_model(), mesh, sc.SparseConfig(compressor=sc.TopK(0.05), collective="allgather"))
    before, waiting = torch.zeros(sum(p.numel() for p in part.own.values())), 0.0

    def check() -> None:
        nonlocal before, waiting
        after, applied = kept(state, part), flat([p.grad for p in part.own.values()])
        entered = everyones(flat([books.given[id(p)] for p in part.own.values()]) + before, column).double().sum(0)
        left = dist.get_world_size(column) * applied.double() + everyones(after, column).double().sum(0)
        torch.testing.assert_close(left, entered, rtol=1e-5, atol=1e-7)
        before, waiting = after, float(after.abs().sum())

    train(part, mesh, check)
    assert waiting > 0, "a test in which nothing is kept back proves nothing"
    for held, group in ((part.own, column), (part.shared, None)):
        rows = everyones(flat(list(held.values())), group)
        assert all(torch.equal(row, rows[0]) for row in rows), "copies have drifted apart"


def tensors_sparse() -> None:
    keep_books(hybrid.split_tensors)


def layers_sparse() -> None:
    keep_books(hybrid.split_layers)


# --- pipelines alone --------------------------------------------------------------------------------------------------


def pipeline(schedule: type[ScheduleGPipe] | type[Schedule1F1B]) -> None:
    """All ranks are one pipeline; it has the losses of one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layers = Stage(whole_model(), rank, size)
    stage = PipelineStage(layers, rank, size, torch.device("cpu"))
    run = schedule(stage, 4, loss_fn=mean_loss)
    optimizer, found = torch.optim.SGD(layers.parameters(), RATE), []
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(step, 0)
        losses: list[Tensor] = []
        run.step(*([inputs] if stage.is_first else []), target=targets if stage.is_last else None, losses=losses)
        optimizer.step()
        found.append(float(torch.stack(losses).mean().detach()) if losses else 0.0)
    expected = [losses[0] for losses in losses_alone(1)]
    if stage.is_last:
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 2e-5, (found, expected)


def gpipe() -> None:
    pipeline(ScheduleGPipe)


def one_forward_one_backward() -> None:
    pipeline(Schedule1F1B)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("sparsecomm")
    run_checks(globals(), sys.argv[1:])
    dist.destroy_process_group()
