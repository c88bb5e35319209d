"""Training with chunks, a shared seed and a leader's top-k over real processes: the books balance, replicas agree."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from training import TINY_BUCKETS, assert_replicas_equal, flat, loss_of, mlp, residual_of, train, wrap

import sparsecomm as sc

MAKERS = {
    "chunked": partial(sc.ChunkTopK, 0.2, chunk=8),
    "random": partial(sc.RandomK, 0.2, seed=5),
    "cyclic": partial(sc.CyclicTopK, 0.2),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each
@pytest.mark.parametrize(("codec", "cap"), [("fp16", TINY_BUCKETS), ("bf16", 25.0), ("fp32", TINY_BUCKETS)])
def test_replicas_stay_bitwise_equal_and_learn(world: sc.World, make: partial, codec: str, cap: float) -> None:
    state = sc.SparseState(make(), value_codec=codec)
    ddp = wrap(mlp(), state, bucket_cap_mb=cap)
    start = loss_of(ddp, 99).item()
    for _ in train(ddp, 12, momentum=0.0):
        assert_replicas_equal(ddp)
    assert loss_of(ddp, 99).item() < 1.1 * start
    assert 0 < state.metrics().density < 0.5


@pytest.mark.parametrize("make", [partial(sc.ChunkTopK, 1.0, chunk=8), partial(sc.RandomK, 1.0)])
def test_everything_equals_plain_ddp(world: sc.World, make: partial) -> None:
    ours, plain = wrap(mlp(), sc.SparseState(make(), value_codec="fp32")), wrap(mlp(), None)
    for _ in zip(train(ours, 7), train(plain, 7), strict=True):
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_train(world: sc.World, make: partial, dtype: torch.dtype) -> None:
    ddp = wrap(mlp(dtype), sc.SparseState(make()))
    for _ in train(ddp, 5, momentum=0.0, dtype=dtype):
        assert_replicas_equal(ddp)
    assert bool(flat(ddp).isfinite().all())


@each
def test_a_resumed_run_goes_on_with_the_same_positions(world: sc.World, make: partial) -> None:
    """All that the positions depend on is the step, the bucket and the residuals: two resumed runs are one."""
    state = sc.SparseState(make(), feedback=sc.MomentumCorrection(0.5))
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 5, momentum=0.0):
        pass
    file = io.BytesIO()
    torch.save({"comm": state.state_dict(), "model": ddp.module.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    runs = []
    for _ in range(2):
        state = sc.SparseState(make(), feedback=sc.MomentumCorrection(0.5))
        ddp = wrap(mlp(), state)
        ddp.module.load_state_dict(loaded["model"])
        state.load_state_dict(loaded["comm"])
        assert state.step == 5
        for _ in train(ddp, 4, first=5, momentum=0.0):
            assert_replicas_equal(ddp)
        runs.append((flat(ddp), residual_of(state, ddp)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_options_may_change_on_the_way_but_not_to_what_does_not_fit(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.05))
    ddp = wrap(mlp(), state)
    changes = [m() for m in MAKERS.values()] + [sc.TopK(0.1)]
    for change, _ in zip([*changes, None], train(ddp, 5, momentum=0.0), strict=True):
        assert_replicas_equal(ddp)
        if change is not None:
            state.update(change)
    with pytest.raises(sc.ConfigError, match="'allgather' cannot exchange what ChunkTopK makes; use 'chunked'"):
        state.update(MAKERS["chunked"](), collective="allgather")
    assert state.metrics().steps == 5


def test_the_presets_train(world: sc.World) -> None:
    for config in (sc.preset("gradientflow", chunk=8, steps_per_epoch=2), sc.preset("scalecom", density=0.1)):
        ddp = wrap(mlp(), sc.SparseState(config))
        for _ in train(ddp, 8, lr=0.02, momentum=0.0):
            assert_replicas_equal(ddp)
        assert bool(flat(ddp).isfinite().all())


@pytest.mark.parametrize(
    ("makers", "words"),
    [
        ((partial(sc.RandomK, 0.1, seed=1), partial(sc.RandomK, 0.1, seed=2)), r"rank 0: seed = 1; rank 1: seed = 2"),
        ((partial(sc.ChunkTopK, 1.0, chunk=8), partial(sc.ChunkTopK, 1.0, chunk=4)), r"chunk = 8; rank 1: chunk = 4"),
    ],
)
def test_ranks_with_other_options_are_told_so(world: sc.World, makers: tuple[partial, partial], words: str) -> None:
    if world.size == 1:
        pytest.skip("nobody to disagree with")
    ddp = wrap(mlp(), sc.SparseState(makers[min(world.rank, 1)]()), bucket_cap_mb=25.0)
    with pytest.raises((RuntimeError, sc.CollectiveMismatch), match=words):
        loss_of(ddp, 0).backward()
    again = wrap(mlp(), sc.SparseState(makers[0]()))
    for _ in train(again, 2):
        assert_replicas_equal(again)
