"""Residuals saved by their rank in every common format, and loaded into worlds of other sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zoo
from ledger import Ledger, sparse
from torch import nn
from training import flat, loss_of, mlp, residual_of, train, wrap

import sparsecomm as sc

FEEDBACKS = [sc.ErrorFeedback(), sc.MomentumCorrection(momentum=0.9)]
Saved = dict[str, torch.Tensor]


def trained(state: sc.SparseState, steps: int = 4, make: Any = mlp, **options: Any) -> nn.Module:
    ddp = wrap(make(), state, **options)
    for _ in train(ddp, steps, momentum=0.0):
        pass
    return ddp


def shared(tmp_path: Path) -> Path:
    """One folder for all ranks."""
    path = [str(tmp_path)]
    dist.broadcast_object_list(path)
    return Path(path[0])


def assert_same(a: Saved, b: Saved) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def assert_goes_on_alike(first: sc.SparseState, a: nn.Module, second: sc.SparseState, b: nn.Module) -> None:
    """Both runs have the same buckets only after a rebuild, so only the sums must agree."""
    for state, ddp in ((first, a), (second, b)):
        before = residual_of(state, ddp)
        assert bool(before.any())
        for _ in train(ddp, 2, first=4, momentum=0.0):
            pass
    assert first.step == second.step == 6


def test_every_tensor_of_a_state_dict_is_plain(world: sc.World) -> None:
    """Tensors are contiguous, own their memory and are on the CPU, as safetensors requires; channels-last ones too."""
    state = sc.SparseState(sc.ThresholdTopK(0.1), collective="allgather")
    trained(state, make=partial(zoo.seeded, zoo.Pictures))
    saved = state.state_dict()
    assert all(type(k) is str and type(t) is torch.Tensor for k, t in saved.items())
    assert not [k for k, t in saved.items() if not t.is_contiguous()]
    assert not [k for k, t in saved.items() if t.requires_grad or t.device.type != "cpu"]
    storages = [t.untyped_storage().data_ptr() for t in saved.values() if t.numel()]
    assert len(set(storages)) == len(storages), "tensors share memory"
    small = [k for k, t in saved.items() if t.untyped_storage().nbytes() != t.numel() * t.element_size()]
    assert not small, "more is stored than the tensor"


@pytest.mark.parametrize("make", [mlp, partial(zoo.seeded, zoo.Pictures), partial(zoo.seeded, zoo.Odd)], ids=str)
@pytest.mark.parametrize("feedback", FEEDBACKS, ids=["ef", "dgc"])
def test_torch_save_by_rank(world: sc.World, tmp_path: Path, make: Any, feedback: sc.Feedback) -> None:
    state = sparse(feedback=feedback)
    ddp = trained(state, make=make)
    folder = shared(tmp_path)
    torch.save(state.state_dict(), folder / f"comm.rank{world.rank}.pt")
    again = sparse(feedback=feedback)
    model = make()
    model.load_state_dict(ddp.module.state_dict())
    resumed = wrap(model, again)
    again.load_state_dict(torch.load(folder / f"comm.rank{world.rank}.pt", weights_only=True))
    assert_same(again.state_dict(), state.state_dict())
    assert_goes_on_alike(state, ddp, again, resumed)


@pytest.mark.parametrize("make", [mlp, partial(zoo.seeded, zoo.Pictures)], ids=["mlp", "channels-last"])
def test_safetensors_by_rank(world: sc.World, tmp_path: Path, make: Any) -> None:
    files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state = sparse(feedback=sc.MomentumCorrection())
    trained(state, make=make)
    path = shared(tmp_path) / f"comm.rank{world.rank}.safetensors"
    files.save_file(state.state_dict(), path)
    again = sparse(feedback=sc.MomentumCorrection())
    kept = wrap(make(), again)
    again.load_state_dict(files.load_file(path))
    assert_same(again.state_dict(), state.state_dict())
    loss_of(kept, 4).backward()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_distributed_checkpoint_under_a_key_of_the_rank(world: sc.World, tmp_path: Path) -> None:
    """torch.distributed.checkpoint treats tensors of one name as copies, so each rank's state needs another name."""
    state = sparse()
    ddp = trained(state)
    folder, key = str(shared(tmp_path) / "dcp"), f"comm.rank{world.rank}"
    dcp.save({"model": ddp.module.state_dict(), key: state.state_dict()}, checkpoint_id=folder)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    mine = {k.removeprefix(key + "."): m for k, m in saved.items() if k.startswith(key + ".")}
    template = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in mine.items()}
    model = mlp()
    loaded: dict[str, Any] = {"model": model.state_dict(), key: template}
    dcp.load(loaded, checkpoint_id=folder)
    again = sparse()
    resumed = wrap(model, again)
    again.load_state_dict(loaded[key])
    assert torch.equal(flat(resumed), flat(ddp))
    assert_same(again.state_dict(), state.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("stateful", [True, False], ids=["the state itself", "its dict"])
def test_distributed_checkpoint_into_a_fresh_state_does_not_lose_the_residual(
    world: sc.World, tmp_path: Path, stateful: bool
) -> None:
    """dcp loads only the names in the new state's state_dict; other saved tensors would silently be lost."""
    state = sparse()
    ddp = trained(state)
    folder, key = str(shared(tmp_path) / "dcp"), f"comm.rank{world.rank}"
    dcp.save({key: state if stateful else state.state_dict()}, checkpoint_id=folder)
    model = mlp()
    model.load_state_dict(ddp.module.state_dict())
    again = sparse()
    resumed = wrap(model, again)
    if stateful:
        dcp.load({key: again}, checkpoint_id=folder)
    else:
        loaded = {key: again.state_dict()}
        dcp.load(loaded, checkpoint_id=folder)
        again.load_state_dict(loaded[key])
    assert again.step == 4
    assert torch.equal(residual_of(again, resumed), residual_of(state, ddp))


@pytest.mark.parametrize("feedback", FEEDBACKS, ids=["ef", "dgc"])
@pytest.mark.parametrize("fmt", ["torch.save", "safetensors"])
def test_a_run_goes_on_with_fewer_ranks(world: sc.World, tmp_path: Path, feedback: sc.Feedback, fmt: str) -> None:
    """P ranks train and save; P - 1 of them load the resharded state (3 -> 2) and continue. Nothing is lost."""
    if world.size == 1:
        pytest.skip("no rank can go")
    if fmt == "safetensors":
        files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state = sparse(feedback=feedback)
    ddp = trained(state)
    folder, fewer = shared(tmp_path), world.size - 1
    mine = state.state_dict()
    if fmt == "torch.save":
        torch.save(mine, folder / f"{world.rank}.pt")
    else:
        files.save_file(mine, folder / f"{world.rank}.st")
    dist.barrier()
    everyone = [
        torch.load(folder / f"{r}.pt", weights_only=True)
        if fmt == "torch.save"
        else files.load_file(folder / f"{r}.st")
        for r in range(world.size)
    ]
    group = dist.new_group(list(range(fewer)))
    if world.rank >= fewer:
        return
    made = sc.reshard(everyone, fewer)
    model = mlp()
    model.load_state_dict(ddp.module.state_dict())
    again = sparse(feedback=feedback)
    ledger = Ledger(model, again, process_group=group)
    again.load_state_dict(made[world.rank])
    for prefix in ("residual", "velocity"):
        for key in (k for k in mine if k.startswith(prefix)):
            before = sum(d[key].double() for d in everyone) / world.size
            after = sum(d[key].double() for d in made) / fewer
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-8)
    ledger.given = {n: t.clone() for n, t in ledger.residuals().items()}
    for step in range(4, 8):
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s).backward(), step))
        if isinstance(feedback, sc.ErrorFeedback):
            ledger.check()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        ledger.check_replicas()


def test_a_checkpoint_of_more_or_fewer_ranks_is_refused_with_the_remedy(world: sc.World) -> None:
    state = sparse()
    ddp = trained(state)
    before, step = residual_of(state, ddp), state.step
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, state.state_dict())
    for size in (world.size + 1, max(1, world.size - 1)):
        if size == world.size:
            continue
        with pytest.raises(sc.StateError, match=r"reshard"):
            state.load_state_dict(sc.reshard(everyone, size)[min(world.rank, size - 1)])
    if world.size > 1:
        with pytest.raises(
            sc.StateError, match=rf"rank {world.rank} of {world.size}.*rank {(world.rank + 1) % world.size}"
        ):
            state.load_state_dict(everyone[(world.rank + 1) % world.size])
    assert torch.equal(residual_of(state, ddp), before)
    assert state.step == step


def test_other_shapes_are_refused_at_loading_into_a_registered_state_that_never_stepped(world: sc.World) -> None:
    """The model is known then: nothing may be exchanged first."""
    source = sparse()
    trained(source)
    checkpoint = source.state_dict()
    checkpoint["residual.2.weight"] = torch.zeros(3, 3, dtype=torch.float32)
    state = sparse()
    ddp = wrap(mlp(), state)
    with pytest.raises(sc.StateError, match=r"'2.weight'.*\(3, 3\).*\(10, 16\)"):
        state.load_state_dict(checkpoint)
    assert state.step == 0
    loss_of(ddp, 0).backward()


@pytest.mark.parametrize("kind", ["residual", "velocity"])
@pytest.mark.parametrize(
    "damage", ["extra", "missing", "dtype", "shape", "nan", "other model"], ids=lambda d: d.replace(" ", "-")
)
def test_a_foreign_checkpoint_is_refused_by_name_and_nothing_changes(world: sc.World, kind: str, damage: str) -> None:
    feedback = sc.MomentumCorrection()
    state = sparse(feedback=feedback)
    ddp = trained(state)
    checkpoint = state.state_dict()
    name = "2.weight"
    key = f"{kind}.{name}"
    if damage == "extra":
        checkpoint[f"{kind}.9.weight"] = torch.zeros(2, dtype=torch.float32)
        name = "9.weight"
    elif damage == "missing":
        del checkpoint[key]
    elif damage == "dtype":
        checkpoint[key] = checkpoint[key].double()
    elif damage == "shape":
        checkpoint[key] = checkpoint[key].t().contiguous()
    elif damage == "nan":
        checkpoint[key][0, 0] = torch.nan
    else:
        other = sparse(feedback=feedback)
        trained(other, make=partial(zoo.seeded, zoo.Tied))
        checkpoint, name = other.state_dict(), "first.weight"
    before = state.state_dict()
    with pytest.raises(sc.StateError, match=name.replace(".", r"\.")):
        state.load_state_dict(checkpoint)
    assert_same(state.state_dict(), before)
    loss_of(ddp, 4).backward()
