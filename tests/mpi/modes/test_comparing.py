"""Training with tree, signs and PowerSGD over real processes: the books balance, replicas agree, many buckets pass."""

from __future__ import annotations

import pytest
import torch
from ledger import Ledger, assert_skips_lose_nothing
from test_every_mode import MODES
from torch import nn
from training import TINY_BUCKETS, assert_replicas_equal, flat, loss_of, mlp, train, wrap

import sparsecomm as sc


def state_of(name: str, codec: str = "fp32", **options: object) -> sc.SparseState:
    compressor = {"tree": sc.TopK(0.1), "sign": sc.Sign(), "powersgd": sc.PowerSGD(2)}[name]
    return sc.SparseState(compressor, collective=name, value_codec=codec, **options)


CASES = [
    ("tree", "fp16", "plain"),
    ("tree", "fp32", "unused, some ranks"),
    ("sign", "fp32", "plain"),
    ("sign", "fp32", "unused, all ranks, views"),
    ("powersgd", "fp32", "plain"),
    ("powersgd", "fp16", "channels-last"),
    ("powersgd", "fp16", "unused, some ranks"),
    ("powersgd", "bf16", "empty parameter"),
]


@pytest.mark.parametrize(("name", "codec", "mode"), CASES)
def test_nothing_is_lost_and_replicas_agree(world: sc.World, name: str, codec: str, mode: str) -> None:
    how = MODES[mode]
    ledger = Ledger(how.make(), state_of(name, codec), **how.ddp)
    for step in range(4):
        ledger.step(lambda step=step: how.backward(ledger.ddp, step))
        ledger.descend()
    ledger.check()
    ledger.check_replicas()
    assert ledger.kept_back > 0


@pytest.mark.parametrize("name", ["sign", "powersgd"])
def test_half_precision_models_train(world: sc.World, name: str) -> None:
    ddp = wrap(mlp(torch.bfloat16), state_of(name))
    for _ in train(ddp, 3, momentum=0.0, dtype=torch.bfloat16):
        assert_replicas_equal(ddp)
    assert bool(flat(ddp).isfinite().all())


@pytest.mark.parametrize("name", ["tree", "sign", "powersgd"])
def test_a_scaler_that_skips_loses_nothing(world: sc.World, name: str) -> None:
    assert_skips_lose_nothing(
        lambda model, scaler: Ledger(model, state_of(name, "fp16", scaler=scaler)),
        steps=5,
        bad=(2, 4),
        every_step=False,
    )


def test_powersgd_with_many_buckets_in_flight_does_not_deadlock(world: sc.World) -> None:
    """torch's own hook does, on CPU, in its first compressed step with two buckets."""
    model = nn.Sequential(*[nn.Linear(16, 16, dtype=torch.float32) for _ in range(20)])
    state = state_of("powersgd", "fp16")
    ddp = wrap(model, state, bucket_cap_mb=TINY_BUCKETS)
    for step in range(3):
        ddp.zero_grad()
        g = torch.Generator().manual_seed(step + world.rank)
        ddp(torch.randn(2, 16, generator=g, dtype=torch.float32)).sum().backward()
        assert_replicas_equal(ddp)
    assert len(state.buckets()) >= 20


def test_auto_takes_the_compressors_own_collective_or_none(world: sc.World) -> None:
    ddp = wrap(mlp(), state := sc.SparseState(sc.PowerSGD(), value_codec="fp16"))
    for step in range(3):
        ddp.zero_grad()
        loss_of(ddp, step).backward()
        assert_replicas_equal(ddp)
    assert state.metrics().steps == 3


def test_ranks_with_other_ranks_of_matrices_are_told_so(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("nobody to disagree with")
    state = sc.SparseState(sc.PowerSGD(2 if world.rank else 1), collective="powersgd")
    ddp = wrap(mlp(), state, bucket_cap_mb=25.0)
    with pytest.raises((RuntimeError, sc.CollectiveMismatch), match=r"rank 0: rank of the matrices = 1; rank 1"):
        loss_of(ddp, 0).backward()
