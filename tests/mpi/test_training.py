"""DDP with the hook against plain DDP, and the invariants through real training."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training import (
    ConvNet,
    assert_replicas_equal,
    flat,
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

IMAGES = {"shape": (3, 6, 6)}


def lossless(**options: Any) -> sc.SparseState:
    """A state that sends everything, exactly."""
    return sc.SparseState(sc.TopK(1.0), value_codec="fp32", collective="allgather", **options)


@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
@pytest.mark.parametrize("compressor", [sc.TopK(0.05), sc.ThresholdTopK(0.05), sc.Dense()], ids=repr)
def test_replicas_stay_bitwise_equal_and_learn(world: sc.World, view: bool, compressor: sc.Compressor) -> None:
    state = sc.SparseState(compressor, collective="auto")
    ddp = wrap(mlp(), state, gradient_as_bucket_view=view)
    start = loss_of(ddp, 99).item()
    for _ in train(ddp, 12):
        assert_replicas_equal(ddp)
    assert state.metrics().steps == state.step == 12
    assert loss_of(ddp, 99).item() < 1.1 * start


@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
@pytest.mark.parametrize("cap", [0.0005, 25.0], ids=["many buckets", "one bucket"])
@pytest.mark.parametrize("compressor", [sc.TopK(1.0), sc.ThresholdTopK(1.0), sc.Dense()], ids=repr)
def test_sending_everything_equals_plain_ddp(
    world: sc.World, view: bool, cap: float, compressor: sc.Compressor
) -> None:
    collective = "dense" if compressor == sc.Dense() else "allgather"
    state = sc.SparseState(compressor, value_codec="fp32", collective=collective)
    options = {"gradient_as_bucket_view": view, "bucket_cap_mb": cap}
    ours, plain = wrap(mlp(), state, **options), wrap(mlp(), None, **options)
    for _ in zip(train(ours, 7), train(plain, 7), strict=True):
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_equal_plain_ddp_to_their_rounding(world: sc.World, dtype: torch.dtype) -> None:
    ours, plain = wrap(mlp(dtype), lossless()), wrap(mlp(dtype), None)
    tolerance = 8 * torch.finfo(dtype).eps
    data = {"dtype": dtype}
    for _ in zip(train(ours, 6, momentum=0.0, **data), train(plain, 6, momentum=0.0, **data), strict=True):
        torch.testing.assert_close(flat(ours), flat(plain), rtol=tolerance, atol=tolerance)
        assert_replicas_equal(ours)
    assert all(p.dtype == dtype for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_train_sparsely(world: sc.World, dtype: torch.dtype) -> None:
    ddp = wrap(mlp(dtype), sc.SparseState(sc.TopK(0.1), value_codec="bf16"))
    for _ in train(ddp, 6, momentum=0.0, dtype=dtype):
        assert_replicas_equal(ddp)
    assert bool(flat(ddp).isfinite().all())


@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
def test_channels_last_convolutions_equal_plain_ddp(world: sc.World, view: bool) -> None:
    models = [ConvNet().to(memory_format=torch.channels_last) for _ in range(2)]
    assert models[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    ours = wrap(models[0], lossless(), gradient_as_bucket_view=view)
    plain = wrap(models[1], None, gradient_as_bucket_view=view)
    for _ in zip(train(ours, 6, **IMAGES), train(plain, 6, **IMAGES), strict=True):
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [mlp, lambda: ConvNet().to(memory_format=torch.channels_last)], ids=["mlp", "conv"])
@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8"])
def test_gradients_are_conserved_through_ddp(world: sc.World, make: Any, codec: str) -> None:
    """Sum of (gradient + residual before) = P * applied + sum of residual after, parameter by parameter."""
    data = IMAGES if make is not mlp else {}
    state = sc.SparseState(sc.TopK(0.1), value_codec=codec, collective="allgather")
    ddp = wrap(make(), state)
    before = torch.zeros_like(flat(ddp))
    for step in range(6):
        ddp.zero_grad()
        incoming = summed(local_gradient(ddp.module, step, **data)) + before
        loss_of(ddp, step, **data).backward()
        after = summed(residual_of(state, ddp))
        outgoing = world.size * flat(ddp, grad_of) + after
        torch.testing.assert_close(outgoing, incoming, rtol=1e-5, atol=1e-6)
        assert float(after.abs().sum()) > 0, "something was kept back"
        before = after
        with torch.no_grad():
            for p in ddp.parameters():
                p -= 0.1 * p.grad


def test_a_bucket_rebuild_loses_nothing(world: sc.World) -> None:
    """DDP lays its buckets out anew after the first step; the residual of step 0 must arrive all the same."""
    state = sc.SparseState(sc.TopK(0.05), value_codec="fp32", collective="allgather")
    ddp = wrap(mlp(), state)
    layouts = []
    total_in = torch.zeros_like(flat(ddp))
    total_out = torch.zeros_like(total_in)
    for step in range(4):
        ddp.zero_grad()
        total_in += summed(local_gradient(ddp.module, step))
        loss_of(ddp, step).backward()
        total_out += world.size * flat(ddp, grad_of)
        layouts.append({i: k.bucket.layout.names for i, k in state._memories.known.items()})
    assert layouts[0] != layouts[1], "the test needs a rebuild"
    assert len(layouts[1]) > 1
    torch.testing.assert_close(total_out + summed(residual_of(state, ddp)), total_in, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
@pytest.mark.parametrize("static_graph", [False, True])
def test_no_sync_accumulates_locally_and_communicates_once(world: sc.World, view: bool, static_graph: bool) -> None:
    state = lossless()
    options = {"gradient_as_bucket_view": view, "static_graph": static_graph}
    ours, plain = wrap(mlp(), state, **options), wrap(mlp(), None, **options)
    for ddp in (ours, plain):  # a static graph must be seen whole once before no_sync
        loss_of(ddp, 0).backward()
    for step in range(0, 12, 2):
        for ddp in (ours, plain):
            ddp.zero_grad()
            with ddp.no_sync():
                loss_of(ddp, step).backward()
            loss_of(ddp, step + 1).backward()
        torch.testing.assert_close(flat(ours, grad_of), flat(plain, grad_of), rtol=1e-5, atol=1e-6)
    assert state.metrics().steps == 7


class Branches(nn.Module):
    """Uses one of two layers, or on some ranks neither of the two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.trunk = nn.Linear(12, 3, dtype=torch.float32)
        self.even, self.odd = nn.Linear(12, 3, dtype=torch.float32), nn.Linear(12, 3, dtype=torch.float32)
        self.use = "even"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.trunk(x)
        return out + getattr(self, self.use)(x) if self.use else out


@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
def test_parameters_that_some_or_all_ranks_do_not_use_equal_plain_ddp(world: sc.World, view: bool) -> None:
    options = {"gradient_as_bucket_view": view, "find_unused_parameters": True}
    ours, plain = wrap(Branches(), lossless(), **options), wrap(Branches(), None, **options)
    for step in range(8):
        use = "even" if step < 3 else ("odd" if (step + world.rank) % 2 else "")
        for ddp in (ours, plain):
            ddp.zero_grad()
            ddp.module.use = use
            loss_of(ddp, step).backward()
        for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_what_is_kept_back_for_a_parameter_that_nobody_uses_is_not_lost(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1), value_codec="fp32", collective="allgather")
    ddp = wrap(Branches(), state, find_unused_parameters=True)
    for step in range(3):
        loss_of(ddp, step).backward()
    kept = {k: v.clone() for k, v in state.state_dict().items() if ".even." in k}
    assert any(bool(v.any()) for v in kept.values())
    ddp.module.use = ""
    for step in range(3, 6):
        ddp.zero_grad()
        loss_of(ddp, step).backward()
    now = state.state_dict()
    for name, value in kept.items():
        assert torch.equal(now[name], value), name


def test_uneven_inputs_with_join_equal_plain_ddp(world: sc.World) -> None:
    ours, plain = wrap(mlp(), lossless()), wrap(mlp(), None)
    for ddp in (ours, plain):
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with ddp.join():
            for step in range(4 + world.rank):
                optimizer.zero_grad()
                loss_of(ddp, step).backward()
                optimizer.step()
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)


def test_two_models_with_two_states_do_not_mix(world: sc.World) -> None:
    first, second = sc.SparseState(sc.TopK(1.0), value_codec="fp32"), sc.SparseState(sc.TopK(0.1))
    a, b, plain = wrap(mlp(), first), wrap(ConvNet(), second), wrap(mlp(), None)
    for step in range(6):
        for ddp in (a, b, plain):
            ddp.zero_grad()
        (loss_of(a, step) + loss_of(b, step, **IMAGES)).backward()
        loss_of(plain, step).backward()
        torch.testing.assert_close(flat(a, grad_of), flat(plain, grad_of), rtol=1e-5, atol=1e-6)
    assert first.metrics().steps == second.metrics().steps == 6
    assert not any("conv" in k for k in first.state_dict())


def test_warm_up_switches_from_dense_to_sparse_without_loss(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(sc.Warmup((1.0, 0.25), 2, 0.05)), value_codec="fp32", dense_steps=1)
    ddp = wrap(mlp(), state)
    total_in, total_out = torch.zeros_like(flat(ddp)), torch.zeros_like(flat(ddp))
    for step in range(8):
        ddp.zero_grad()
        total_in += summed(local_gradient(ddp.module, step))
        loss_of(ddp, step).backward()
        total_out += world.size * flat(ddp, grad_of)
    torch.testing.assert_close(total_out + summed(residual_of(state, ddp)), total_in, rtol=1e-5, atol=1e-6)
    assert state.metrics().density < 1.0


def test_without_feedback_every_step_stands_alone(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1), feedback=None, collective="allgather")
    ddp = wrap(mlp(), state)
    grads = []
    for _ in range(3):
        ddp.zero_grad()
        loss_of(ddp, 0).backward()
        grads.append(flat(ddp, grad_of))
    assert torch.equal(grads[1], grads[2]), "same gradient, same selection: nothing was carried over"
    assert not any(bool(t.any()) for k, t in state.state_dict().items() if k.startswith("residual"))


def test_metrics_count_steps_buckets_and_bytes(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective="allgather", value_codec="fp16")
    ddp = wrap(mlp(), state)
    per_step = []
    numel = sum(p.numel() for p in ddp.parameters())
    for _ in train(ddp, 5):
        per_step.append(state.metrics())
    last = per_step[-1]
    assert (last.steps, last.numel) == (5, 5 * numel)
    assert last.buckets == 1 + 4 * len(state._memories.known) or last.buckets > 5
    assert last.nnz >= 5 * 0.08 * numel
    assert last.nonfinite == 0
    headers = 88 * (world.size - 1) * last.buckets
    assert last.bytes_sent >= headers + (world.size - 1) * 2 * last.nnz
    assert last.dense_bytes <= 2 * 4 * last.numel * (world.size - 1) / world.size
    assert last.ratio == (last.dense_bytes / last.bytes_sent if world.size > 1 else 1.0)
    assert last.density == last.nnz / last.numel
    received = torch.tensor([last.bytes_sent - last.bytes_received], dtype=torch.int64)
    dist.all_reduce(received)
    assert received.item() == 0, "what one sends another receives"
    assert all(b.bytes_sent >= a.bytes_sent for a, b in pairwise(per_step))


def test_averaging_by_hand_equals_ddp(world: sc.World) -> None:
    model, plain = mlp(), wrap(mlp(), None)
    state = lossless(model=model)
    for step in range(6):
        for m in (model, plain):
            m.zero_grad()
            loss_of(m, step).backward()
        sc.allreduce_gradients(model, state, bucket_bytes=500)
        torch.testing.assert_close(flat(model, grad_of), flat(plain, grad_of), rtol=1e-5, atol=1e-6)


def test_groups_of_ranks_average_among_themselves(world: sc.World) -> None:
    """Two halves of the world train two models, each with its average. In small worlds a half is one rank."""
    halves = [list(range(world.size // 2)) or [0], list(range(world.size // 2, world.size))]
    groups = [dist.new_group(ranks) for ranks in halves]
    mine = groups[int(world.rank in halves[1])]
    ours = wrap(mlp(), lossless(), process_group=mine)
    plain = wrap(mlp(), None, process_group=mine)
    for _ in zip(train(ours, 6), train(plain, 6), strict=True):
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)
