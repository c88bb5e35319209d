"""`collective="native"`: sums by torch.distributed itself, after everything that waited was sent."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    assert_replicas_equal,
    flat,
    gathered,
    grad_of,
    local_gradient,
    loss_of,
    mlp,
    residual_of,
    summed,
    train,
    wrap,
)

import sparsecomm as sc
from sparsecomm.ddp.native import NativeSums


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of the buckets that the process group has been given."""
    found: list[int] = []
    start = NativeSums.start

    def spy(self: NativeSums, one: Any, *rest: Any) -> None:
        found.append(one.index)
        start(self, one, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(NativeSums, "start", spy)
        yield found


def gradients(model: nn.Module, step: int) -> torch.Tensor:
    """The averaged gradients of a step."""
    model.zero_grad()
    loss_of(model, step).backward()
    return flat(model, grad_of)


def test_the_gradients_have_the_bits_of_plain_ddp(world: sc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = wrap(mlp(), sc.SparseState(sc.Dense(), collective="native")), wrap(mlp(), None)
    gradients(ours, 0)  # DDP makes its buckets anew after the first step
    gradients(ours, 1)
    gradients(plain, 0)
    with counted(monkeypatch) as buckets:
        for step in range(2, 5):
            assert torch.equal(gradients(ours, step), gradients(plain, step))
    assert len(buckets) == 3 * len(set(buckets)) > 0


@pytest.mark.parametrize("fuse_bytes", [0, 1 << 20])
def test_what_waits_is_sent_first(world: sc.World, monkeypatch: pytest.MonkeyPatch, fuse_bytes: int) -> None:
    state = sc.SparseState(sc.TopK(density=0.1), collective="allgather", value_codec="fp32", fuse_bytes=fuse_bytes)
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 3):
        pass
    state.update(collective="native")
    waiting = residual_of(state, ddp)
    with counted(monkeypatch) as buckets:
        mine, average = local_gradient(ddp.module, 3), gradients(ddp, 3)
        assert not buckets
    torch.testing.assert_close(summed(mine + waiting), average * world.size, rtol=1e-4, atol=1e-6)
    assert residual_of(state, ddp).abs().max() == 0
    with counted(monkeypatch) as buckets:
        mine, average = local_gradient(ddp.module, 4), gradients(ddp, 4)
        assert buckets
    torch.testing.assert_close(summed(mine), average * world.size, rtol=1e-4, atol=1e-6)
    sent = state.last_step()
    assert (sent.nnz, sent.numel) == (mine.numel(), mine.numel())
    assert sent.bytes_sent == sent.dense_bytes


def test_it_takes_turns_with_compression(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(density=0.1), value_codec="fp32")
    ddp = wrap(mlp(), state)
    for step in range(12):
        state.update(collective="native" if step % 6 >= 3 else "allgather")
        before = residual_of(state, ddp) if step else 0.0
        mine, average = local_gradient(ddp.module, step), gradients(ddp, step)
        torch.testing.assert_close(
            summed(mine + before), world.size * average + summed(residual_of(state, ddp)), rtol=1e-4, atol=1e-6
        )


def test_a_loaded_residual_is_sent(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(density=0.1), collective="allgather", value_codec="fp32")
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 3):
        pass
    saved, waiting = copy.deepcopy(state.state_dict()), residual_of(state, ddp)
    state.update(collective="native")
    for step in range(3, 6):
        gradients(ddp, step)
    state.load_state_dict(saved)
    mine, average = local_gradient(ddp.module, 6), gradients(ddp, 6)
    torch.testing.assert_close(summed(mine + waiting), average * world.size, rtol=1e-4, atol=1e-6)


class Halves(nn.Module):
    """Two layers, of which a rank uses both or only the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 3, dtype=torch.float32)
        self.second = nn.Linear(3, 3, dtype=torch.float32)
        self.both = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) if self.both else x


def test_the_residual_of_an_unused_layer_is_not_lost(world: sc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    state = sc.SparseState(sc.TopK(density=0.1), collective="allgather", value_codec="fp32")
    ddp = wrap(Halves(), state, bucket_cap_mb=25, find_unused_parameters=True)
    for _ in train(ddp, 3):
        pass
    state.update(collective="native")
    last = world.rank == world.size - 1
    ddp.module.both = not last
    waiting = residual_of(state, ddp)
    with counted(monkeypatch) as buckets:
        for step in (3, 4):  # the last rank keeps what its second layer holds back
            gradients(ddp, step)
        assert not buckets
    if last:
        kept = residual_of(state, ddp)
        assert torch.equal(kept[kept != 0], waiting[kept != 0])
        assert kept.abs().max() > 0
    ddp.module.both = True
    gradients(ddp, 5)
    assert residual_of(state, ddp).abs().max() == 0
    with counted(monkeypatch) as buckets:
        gradients(ddp, 6)
        assert buckets


def test_overflow_travels_as_in_plain_ddp(world: sc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ddp = wrap(mlp(), sc.SparseState(sc.Dense(), collective="native", scaler=scaler))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    with counted(monkeypatch) as buckets:
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(ddp, step)
            if step == 3 and world.rank == world.size - 1:
                loss = loss * float("inf")
            before = flat(ddp)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(flat(ddp), before) == (step == 3)
        assert buckets
    assert_replicas_equal(ddp)


@pytest.mark.parametrize("where", ["first", "every"])
def test_nan_travels_as_in_plain_ddp(world: sc.World, where: str) -> None:
    ddp = wrap(mlp(), sc.SparseState(sc.Dense(), collective="native"))
    for step in range(3):
        gradients(ddp, step)
    ddp.zero_grad()
    loss = loss_of(ddp, 3) * (float("nan") if world.rank == 0 else 1.0)
    if where == "first":  # of one bucket, and finite in the others
        loss = loss_of(ddp, 3) + (ddp.module[0].weight.flatten()[0] * (float("nan") if world.rank == 0 else 0.0))
    loss.backward()
    found = flat(ddp, grad_of)
    assert bool(found.isnan().any())
    assert bool(found.isnan().all()) == (where == "every")
    ddp.zero_grad()
    assert bool(gradients(ddp, 4).isfinite().all())


def step_by_hand(
    model: nn.Module, state: sc.SparseState, number: int, *, bucket_bytes: int = 400, broken: bool = False
) -> None:
    """One averaging of gradients; with a sparse gradient of the last layer, which is refused, if broken."""
    model.zero_grad()
    loss_of(model, number, dtype=model[0].weight.dtype).backward()
    weight = model[4].weight
    if broken and weight.grad is not None:
        weight.grad = weight.grad.to_sparse()
    sc.allreduce_gradients(model, state, bucket_bytes=bucket_bytes)


def nothing(state: sc.SparseState) -> dict[str, int]:
    return {}


def other_codec(state: sc.SparseState) -> dict[str, int]:
    state.update(value_codec="fp16")
    return {}


def other_fusion(state: sc.SparseState) -> dict[str, int]:
    state.update(fuse_bytes=900)
    return {}


def other_buckets(state: sc.SparseState) -> dict[str, int]:
    return {"bucket_bytes": 1000}


def loaded(state: sc.SparseState) -> dict[str, int]:
    state.load_state_dict(state.state_dict())
    return {}


@pytest.mark.parametrize("change", [nothing, other_codec, other_fusion, other_buckets, loaded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"fuse_bytes": 1 << 16}, {"scaler": True}], ids=str)
def test_the_error_of_one_rank_reaches_all(
    world: sc.World, dtype: torch.dtype, options: dict[str, Any], change: Callable[[sc.SparseState], dict[str, int]]
) -> None:
    given = {**options, "scaler": torch.amp.GradScaler("cpu")} if "scaler" in options else options
    model = mlp(dtype)
    state = sc.SparseState(sc.Dense(), model=model, collective="native", **given)
    for number in range(3):
        step_by_hand(model, state, number)
    buckets = change(state)
    with pytest.raises(sc.SparseCommError, match="sparse" if world.rank == 0 else "rank 0"):
        step_by_hand(model, state, 3, broken=world.rank == 0, **buckets)
    for number in range(4, 7):
        step_by_hand(model, state, number, **buckets)
        assert all(torch.equal(flat(model, grad_of), other) for other in gathered(flat(model, grad_of)))


def test_a_density_that_fails_on_one_rank_fails_on_all(world: sc.World) -> None:
    def density(step: int) -> float:
        if step == 4 and world.rank == world.size - 1:
            raise ValueError("no density today")
        return 0.5

    model = mlp()
    state = sc.SparseState(sc.TopK(density=density), model=model, collective="native")
    for number in range(4):
        step_by_hand(model, state, number)
    with pytest.raises((sc.SparseCommError, ValueError), match="no density today"):
        step_by_hand(model, state, 4)
    for number in range(5, 8):
        step_by_hand(model, state, number)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_that_require_gradients_are_averaged(world: sc.World) -> None:
    model = mlp()
    state = sc.SparseState(sc.Dense(), model=model, collective="native", fuse_bytes=1 << 16)
    for number in range(4):
        model.zero_grad()
        loss_of(model, number).backward(create_graph=True)
        mine = flat(model, grad_of).detach()
        sc.allreduce_gradients(model, state, bucket_bytes=400)
        torch.testing.assert_close(flat(model, grad_of) * world.size, summed(mine), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", ["allgather", "native"])
def test_nan_in_one_of_two_models_does_not_disturb_the_other(world: sc.World, other: str) -> None:
    first = wrap(mlp(), sc.SparseState(sc.Dense(), collective="native"))
    second = wrap(mlp(), sc.SparseState(sc.TopK(0.1), collective=other))
    slow = [p.register_hook(lambda g: (time.sleep(0.02 * (world.rank == 0)), g)[1]) for p in second.parameters()]
    for step in range(6):
        first.zero_grad()
        second.zero_grad()
        (loss_of(second, step) + loss_of(first, step) * (float("nan") if step >= 3 else 1.0)).backward()
    assert bool(flat(first, grad_of).isnan().all())
    assert bool(flat(second, grad_of).isfinite().all())
    assert len(slow) == 6


def test_ranks_may_have_made_other_states_before(world: sc.World) -> None:
    for _ in range(1 + world.rank):
        sc.SparseState(sc.Dense())
    ddp = wrap(mlp(), sc.SparseState(sc.Dense(), collective="native"))
    for step in range(3):
        gradients(ddp, step)
    ddp.zero_grad()
    (loss_of(ddp, 3) * float("nan")).backward()
    assert bool(flat(ddp, grad_of).isnan().all())


def test_momentum_is_exchanged_by_our_own_sum(world: sc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    state = sc.SparseState(sc.preset("dgc", steps_per_epoch=1).change(collective="native"))
    ddp = wrap(mlp(), state)
    with counted(monkeypatch) as buckets:
        for _ in train(ddp, 4, momentum=0.0):
            pass
        assert not buckets
    assert_replicas_equal(ddp)


def test_a_bucket_without_elements_is_averaged(world: sc.World) -> None:
    model = nn.ParameterList([torch.ones(n, dtype=torch.float32) for n in (3, 0, 5, 0)])
    state = sc.SparseState(sc.Dense(), model=model, collective="native", fuse_bytes=0)
    for _ in range(4):
        for p in model:
            p.grad = torch.full_like(p, float(world.rank))
        sc.allreduce_gradients(model, state, bucket_bytes=1)
        for p in model:
            assert p.grad is not None
            assert bool((p.grad == (world.size - 1) / 2).all())


def test_uneven_inputs_work(world: sc.World) -> None:
    ddp = wrap(mlp(), sc.SparseState(sc.Dense(), collective="native"))
    with ddp.join():
        for step in range(3 + world.rank):
            loss_of(ddp, step).backward()
    assert_replicas_equal(ddp)


def test_a_model_without_ddp_and_a_group_of_its_own(world: sc.World) -> None:
    model = mlp()
    assert not isinstance(model, DistributedDataParallel)
    group = torch.distributed.new_group(list(range(world.size)))
    state = sc.SparseState(sc.Dense(), model=model, process_group=group, collective="native")
    for number in range(3):
        model.zero_grad()
        loss_of(model, number).backward()
        mine = flat(model, grad_of)
        sc.allreduce_gradients(model, state)
        torch.testing.assert_close(flat(model, grad_of) * world.size, summed(mine), rtol=1e-4, atol=1e-6)
