"""Tensor parallelism inside of DDP: the model's parameters become attributes in the first forward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

NAMES = ["0.bias", "0.weight", "1.scale", "2.bias", "2.weight"]


class Scaled(nn.Module):
    """Has a parameter that is not split."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.scale * x).tanh()


@pytest.fixture
def mesh(world: sc.World) -> DeviceMesh:
    split = 2 if world.size % 2 == 0 else 1
    return init_device_mesh("cpu", (world.size // split, split), mesh_dim_names=("data", "tensor"))


def split(mesh: DeviceMesh) -> DistributedDataParallel:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.float32), Scaled(), nn.Linear(16, 4, dtype=torch.float32))
    # One parameter that is a DTensor and one that is not: torch changes their order.
    model = parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return DistributedDataParallel(model, device_mesh=mesh["data"], bucket_cap_mb=0.0005)


def losses(ddp: DistributedDataParallel, mesh: DeviceMesh, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        torch.manual_seed(100 * step + mesh.get_local_rank("data"))
        optimizer.zero_grad()
        loss = ddp(torch.randn(4, 8, dtype=torch.float32)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def sgd(ddp: DistributedDataParallel, state: sc.SparseState) -> torch.optim.Optimizer:
    return torch.optim.SGD(ddp.parameters(), lr=0.1)


def ahead(ddp: DistributedDataParallel, state: sc.SparseState) -> torch.optim.Optimizer:
    return sc.optim.SGD(ddp.parameters(), state, lr=0.1)


@pytest.mark.parametrize("make", [sgd, ahead])
def test_at_density_1_the_run_is_that_of_plain_ddp(
    mesh: DeviceMesh, make: Callable[[DistributedDataParallel, sc.SparseState], torch.optim.Optimizer]
) -> None:
    plain = split(mesh)
    expected = losses(plain, mesh, torch.optim.SGD(plain.parameters(), lr=0.1), 6)
    ddp, state = split(mesh), sc.SparseState(sc.TopK(1.0), collective="allgather", value_codec="fp32")
    ddp.register_comm_hook(state, sc.sparse_hook)
    assert losses(ddp, mesh, make(ddp, state), 6) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("asked", ["before the first pass", "after it"])
def test_names_are_those_of_the_model_and_a_checkpoint_goes_on(mesh: DeviceMesh, asked: str) -> None:
    def trained() -> tuple[DistributedDataParallel, sc.SparseState]:
        ddp, state = split(mesh), sc.SparseState(sc.TopK(0.2), collective="allgather")
        ddp.register_comm_hook(state, sc.sparse_hook)
        if asked == "before the first pass":
            assert state.group_size() == mesh["data"].size()  # looks for the model
        losses(ddp, mesh, sgd(ddp, state), 3)
        return ddp, state

    _, state = trained()
    saved = state.state_dict()
    names = sorted(key.removeprefix("residual.") for key in saved if key.startswith("residual."))
    assert names == NAMES
    assert any(bool(saved[f"residual.{name}"].any()) for name in NAMES)
    ddp, again = trained()
    again.load_state_dict(saved)
    loaded = again.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    losses(ddp, mesh, sgd(ddp, again), 2)
