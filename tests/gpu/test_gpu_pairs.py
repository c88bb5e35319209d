"""Whole bodies on a GPU: the reference's bytes, pairs and errors, and an exchange that waits three times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pair_cases
import pytest
import torch
from helpers import Cluster, gradient, plan, same_bits

from sparsecomm import kernels
from sparsecomm.compress import ThresholdTopK
from sparsecomm.exchange import exchange
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.device import CudaSide
from sparsecomm.types import IndexCodec, ValueCodec

SIZES = ((0, 0), (0, 9), (1, 1), (1, 900), (129, 4000), (300, 1300), (40_000, 1_000_003))


@pytest.mark.parametrize("value_codec", list(ValueCodec))
@pytest.mark.parametrize("index_codec", list(IndexCodec))
def test_payloads_have_the_references_bytes(index_codec: IndexCodec, value_codec: ValueCodec) -> None:
    for seed, (nnz, numel) in enumerate(SIZES):
        pair_cases.check_encode("cuda", (index_codec, value_codec), nnz, numel, seed)


@pytest.mark.parametrize("value_codec", list(ValueCodec))
@pytest.mark.parametrize("index_codec", list(IndexCodec))
def test_payloads_of_one_codec_are_decoded_together(index_codec: IndexCodec, value_codec: ValueCodec) -> None:
    pair_cases.check_decoded("cuda", [pair_cases.payload(r, index_codec, value_codec, *s) for r, s in enumerate(SIZES)])


def test_payloads_of_different_codecs_are_decoded_together() -> None:
    codecs = [(index, value) for index in IndexCodec for value in ValueCodec]
    pair_cases.check_decoded("cuda", [pair_cases.payload(r, *c, 3000, 70_000) for r, c in enumerate(codecs)])


def test_damaged_payloads_get_the_verdict_of_a_loop_over_the_reference() -> None:
    rng = np.random.default_rng(0)
    for seed in range(300):
        made = []
        for rank in range(4):
            numel = int(rng.integers(1, 20_000))
            codecs = IndexCodec(int(rng.integers(0, 5))), ValueCodec(int(rng.integers(0, 4)))
            made.append(pair_cases.payload(rank, *codecs, int(rng.integers(0, min(numel, 900))), numel))
        for who in rng.integers(0, 4, seed % 3):
            made[who] = pair_cases.damaged(made[who], int(rng.integers(0, 6)), seed)
        pair_cases.check_decode("cuda", [said for said, _ in made], pair_cases.together(made))


@pytest.mark.parametrize("size", [2, 4])
def test_an_exchange_waits_three_times_whatever_the_number_of_ranks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises an error if the host waits for anything but an event; the averages are those of the CPU."""
    fetched, fetch = [], CudaSide.fetch
    monkeypatch.setattr(CudaSide, "fetch", lambda *args: fetched.append(1) or fetch(*args))
    averages = {}
    for device in ("cpu", "cuda"):
        kernels.set_path("reference" if device == "cpu" else None)
        try:
            averages[device] = exchanged(size, device, fetched)
        finally:
            kernels.set_path(None)
    assert all(same_bits(a, b) for a, b in zip(averages["cpu"], averages["cuda"], strict=True))


def exchanged(size: int, device: str, fetched: list[int]) -> list[torch.Tensor]:
    """Runs three steps: an exact one, one that warms up the other kernels, and one that torch watches for waits."""
    n, cluster, out = 5000, Cluster(size, 5000), []
    arenas = [Arena(pinned=device == "cuda") for _ in range(size)]
    memories = [Arena(device) for _ in range(size)]
    for bucket in cluster.buckets:
        bucket.residual = torch.zeros(n, device=device, dtype=torch.float32)
    for step in range(3):
        grads = [gradient("normal", n, torch.float32, r).to(device) for r in range(size)]
        options = {"value_codec": ValueCodec.FP16, "feedback": None}
        how = plan(n, compressor=ThresholdTopK(0.05), step=step, **options)

        def make(channel: Any, grads: Any = grads, how: Any = how) -> Any:
            r = channel.rank
            return exchange(channel, cluster.buckets[r], grads[r], how, arenas[r], memories[r])

        fetched.clear()
        watched = device == "cuda" and step == 2
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            cluster.world.run(make)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(fetched) == (3 * size if device == "cuda" else 0)
        out += [g.cpu() for g in grads]
    return out
