"""Training with split-reduce over real processes: the books balance, replicas agree, a run can be resumed."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch import nn
from training import TINY_BUCKETS, assert_replicas_equal, flat, loss_of, mlp, residual_of, train, wrap

import sparsecomm as sc
from sparsecomm.exchange.methods.split_reduce.regions import Regions

SPLITS = ("split_reduce", "ssar")


def made(state: sc.SparseState) -> set[int]:
    """The steps at which the regions of all buckets were made."""
    shared = [known.bucket.shared for known in state._memories.known.values()]
    assert shared
    assert all(isinstance(regions, Regions) for regions in shared)
    return {regions.made for regions in shared if isinstance(regions, Regions)}


@pytest.mark.parametrize(
    ("collective", "compressor", "codec", "cap"),
    [
        ("split_reduce", sc.TopK(0.1), "fp16", TINY_BUCKETS),
        ("split_reduce", sc.ThresholdTopK(0.1), "int8", TINY_BUCKETS),
        ("split_reduce", sc.TopK(0.1), "fp32", 25.0),
        ("ssar", sc.TopK(0.1), "int8", TINY_BUCKETS),
        ("ssar", sc.ThresholdTopK(0.1), "fp16", 25.0),
    ],
)
def test_replicas_stay_bitwise_equal_and_learn(
    world: sc.World, collective: str, compressor: sc.Compressor, codec: str, cap: float
) -> None:
    state = sc.SparseState(compressor, collective=collective, value_codec=codec)
    ddp = wrap(mlp(), state, bucket_cap_mb=cap)
    start = loss_of(ddp, 99).item()
    for _ in train(ddp, 12, momentum=0.0):
        assert_replicas_equal(ddp)
    assert loss_of(ddp, 99).item() < 1.1 * start
    assert made(state) <= {0, 1}, "made once, and again where DDP rebuilt its buckets"


def test_ssar_of_everything_equals_plain_ddp(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(1.0), collective="ssar", value_codec="fp32")
    ours, plain = wrap(mlp(), state), wrap(mlp(), None)
    for _ in zip(train(ours, 7), train(plain, 7), strict=True):
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_train(world: sc.World, dtype: torch.dtype) -> None:
    ddp = wrap(mlp(dtype), sc.SparseState(sc.TopK(0.1), collective="split_reduce", value_codec="bf16"))
    for _ in train(ddp, 6, momentum=0.0, dtype=dtype):
        assert_replicas_equal(ddp)
    assert bool(flat(ddp).isfinite().all())


@pytest.mark.parametrize("collective", SPLITS)
def test_after_loading_a_checkpoint_regions_are_made_again_and_the_run_goes_on(
    world: sc.World, collective: str
) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective=collective)
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 5, momentum=0.0):
        pass
    file = io.BytesIO()
    torch.save({"comm": state.state_dict(), "model": ddp.module.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    runs = []
    for fresh in (False, True, True):
        if fresh:
            state = sc.SparseState(sc.TopK(0.1), collective=collective)
            ddp = wrap(mlp(), state)
        ddp.module.load_state_dict(loaded["model"])
        state.load_state_dict(loaded["comm"])
        for step in train(ddp, 4, first=5, momentum=0.0):
            assert_replicas_equal(ddp)
            assert made(state) <= {5, 6}, f"step {step}: regions of before the checkpoint are in use"
        runs.append((flat(ddp), residual_of(state, ddp)))
    # A new DDP model starts with other buckets than the live one has by now, so only the two new ones are equal.
    for a, b in zip(*runs[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("collective", SPLITS)
def test_options_may_change_on_the_way(world: sc.World, collective: str) -> None:
    state = sc.SparseState(sc.TopK(0.05), collective="allgather")
    ddp: nn.Module = wrap(mlp(), state)
    changes = [{"collective": collective}, {"density": 0.3}, {"collective": "dense"}, {"collective": collective}]
    for change, _ in zip([{}, *changes, {}], train(ddp, 6, momentum=0.0), strict=True):
        assert_replicas_equal(ddp)
        state.update(**change)
    assert state.metrics().steps == 6


def test_ranks_with_other_densities_are_told_so(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("nobody to disagree with")
    state = sc.SparseState(sc.TopK(0.1 if world.rank else 0.2), collective="split_reduce")
    ddp = wrap(mlp(), state, bucket_cap_mb=25.0)
    with pytest.raises((RuntimeError, sc.CollectiveMismatch), match=r"rank 0: k = .*rank 1: k = "):
        loss_of(ddp, 0).backward()
    state.update(density=0.1)
    fresh = wrap(mlp(), sc.SparseState(sc.TopK(0.1), collective="split_reduce"))
    for _ in train(fresh, 2):
        assert_replicas_equal(fresh)


@pytest.mark.parametrize("collective", SPLITS)
def test_a_bucket_by_hand(world: sc.World, collective: str) -> None:
    """Without DDP: after each of two steps, applied averages and residuals add up to the gradients."""
    model = mlp()
    state = sc.SparseState(sc.TopK(0.2), collective=collective, value_codec="fp32", model=model)
    step = partial(loss_of, model)
    for number in range(3):
        model.zero_grad()
        step(number).backward()
        sc.allreduce_gradients(model, state)
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
