"""A script may change torch's default dtype: a float32 model trains to the same bits, in every way of exchanging."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from training import assert_replicas_equal, flat, mlp, train, wrap

import sparsecomm as sc
from sparsecomm.exchange.method import methods
from sparsecomm.presets import PRESETS

STEPS = 4
COMPRESSORS = {
    "topk": sc.TopK(0.1),
    "threshold": sc.ThresholdTopK(0.1),
    "chunks": sc.ChunkTopK(0.2, chunk=4),
    "random": sc.RandomK(0.2),
    "cyclic": sc.CyclicTopK(0.2),
    "power": sc.PowerSGD(2),
    "sign": sc.Sign(),
}
FEEDBACK = {
    "ef": sc.ErrorFeedback(),
    "momentum": sc.MomentumCorrection(clip_norm=1.0),
    "adam": sc.AdamCorrection(clip_norm=1.0),
    "aligned": sc.AdamCorrection(clip_norm=1.0, aligned=True),
}


@pytest.fixture(autouse=True)
def _same_default_afterwards(world: sc.World) -> Iterator[None]:
    if world.size > 2:
        pytest.skip("two ranks show all of it")
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def trained(config: sc.SparseConfig, default: torch.dtype) -> torch.Tensor:
    """Returns the parameters after some steps. What was saved loads again."""
    torch.set_default_dtype(default)
    state = sc.SparseState(config)
    ddp = wrap(mlp(), state)
    for _ in train(ddp, STEPS, momentum=0.0):
        assert_replicas_equal(ddp)
    again = sc.SparseState(config, model=ddp)
    saved = state.state_dict()
    again.load_state_dict(saved)
    loaded = again.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) and saved[name].dtype == loaded[name].dtype for name in saved)
    return flat(ddp)


def test_the_default_is_the_one_that_was_asked_for(world: sc.World) -> None:
    """Without this, `make dtypes` could pass under float32."""
    asked = os.environ.get("SPARSECOMM_TEST_DTYPE", "float32")
    assert str(torch.get_default_dtype()) == f"torch.{asked}"


def assert_the_same(config: sc.SparseConfig, other: torch.dtype) -> None:
    expected = trained(config, torch.float32)
    found = trained(config, other)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("collective", methods())
def test_every_collective(world: sc.World, collective: str) -> None:
    compressor = next((c for c in COMPRESSORS.values() if collective in c.collectives), sc.TopK(0.1))
    assert_the_same(sc.SparseConfig(compressor=compressor, collective=collective), torch.bfloat16)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor(world: sc.World, name: str) -> None:
    compressor = COMPRESSORS[name]
    collective = compressor.collectives[0] if compressor.collectives else "allgather"
    assert_the_same(sc.SparseConfig(compressor=compressor, collective=collective), torch.float64)


@pytest.mark.parametrize("name", FEEDBACK)
def test_every_feedback(world: sc.World, name: str) -> None:
    assert_the_same(
        sc.SparseConfig(compressor=sc.TopK(0.1), collective="allgather", feedback=FEEDBACK[name]), torch.bfloat16
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(world: sc.World, name: str) -> None:
    """What "auto" measures may differ between two runs, so these need not end at the same bits."""
    found = trained(sc.preset(name, **({"steps_per_epoch": 2} if name == "dgc" else {})), torch.float64)
    assert found.isfinite().all()
