"""Codecs on every path equal the reference byte for byte, keep their size bounds, and survive hostile bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from by_path import by_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vectors import same_bits, seeds, vector

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import IndexCodec, ValueCodec

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPARSE = tuple(c for c in IndexCodec if c != IndexCodec.DENSE)


def positions(numel: int, nnz: int, seed: int, *, clustered: bool = False) -> torch.Tensor:
    """Returns nnz ascending positions below numel."""
    rng = np.random.default_rng(seed)
    if clustered and nnz:
        start = int(rng.integers(0, numel - nnz + 1))
        chosen = np.arange(start, start + nnz)
    else:
        chosen = (
            np.sort(rng.choice(numel, nnz, replace=False)) if numel < 10**6 else np.unique(rng.integers(0, numel, nnz))
        )
    return torch.from_numpy(chosen.astype(np.uint32))


def encode(codec: IndexCodec, indices: torch.Tensor, numel: int) -> torch.Tensor:
    out = torch.empty(kernels.max_index_bytes(codec, indices.numel(), numel), dtype=torch.uint8)
    return out[: kernels.encode_indices(codec, indices, numel, out)].clone()


def decode(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int) -> torch.Tensor:
    out = torch.full((nnz,), 2**32 - 1, dtype=torch.int64).to(torch.uint32)
    kernels.decode_indices(codec, data, nnz, numel, out)
    return out


@st.composite
def index_lists(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    numel = draw(st.sampled_from([1, 2, 64, 127, 128, 129, 1000, 70_000, 2**31 + 5, 2**32]))
    most = min(numel, 3000)
    nnz = draw(st.one_of(st.integers(0, min(most, 300)), st.just(most)))
    indices = positions(numel, nnz, draw(seeds), clustered=draw(st.booleans()))
    if indices.numel() and draw(st.booleans()):
        indices = torch.cat([indices[:-1], torch.tensor([numel - 1], dtype=torch.int64).to(torch.uint32)])
        indices = torch.from_numpy(np.unique(indices.numpy()))
    return indices, numel


@many
@given(index_lists(), st.sampled_from(SPARSE))
def test_indices_round_trip_and_equal_the_reference(
    path: str, case: tuple[torch.Tensor, int], codec: IndexCodec
) -> None:
    indices, numel = case
    if codec == IndexCodec.BITMAP and numel > 10**6:
        return  # a bitmap of 512 MB tests nothing more
    data = encode(codec, indices, numel)
    assert torch.equal(data, by_reference(path, lambda: encode(codec, indices, numel)))
    assert data.numel() <= kernels.max_index_bytes(codec, indices.numel(), numel)
    assert torch.equal(decode(codec, data, indices.numel(), numel), indices)
    assert torch.equal(by_reference(path, lambda: decode(codec, data, indices.numel(), numel)), indices)


GOLDEN = {  # positions 2, 9 of 10; worked by hand in docs/wire-format.md
    IndexCodec.RAW: "02000000 09000000",
    IndexCodec.BITPACK: "03 32",  # gaps 2, 6 in 3 bits: 010, 110 from the low end
    IndexCodec.RICE: "02 0a 05",
    IndexCodec.BITMAP: "04 02",
}


@pytest.mark.parametrize("codec", SPARSE)
def test_bytes_are_those_of_the_document(path: str, codec: IndexCodec) -> None:
    indices = torch.tensor([2, 9], dtype=torch.int64).to(torch.uint32)
    assert bytes(encode(codec, indices, 10).numpy()) == bytes.fromhex(GOLDEN[codec])


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1])
def test_sizes_are_near_the_entropy_and_estimated_well(path: str, density: float) -> None:
    n = 10_000_000
    indices = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(n) < density).astype(np.uint32))
    nnz = indices.numel()
    entropy = n * -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / nnz
    for codec in (IndexCodec.RICE, IndexCodec.BITPACK):
        size = encode(codec, indices, n).numel()
        assert abs(kernels.estimate_index_bytes(codec, nnz, n) / size - 1) < 0.05
        if codec == IndexCodec.RICE:
            assert size * 8 / nnz <= 1.06 * entropy
        elif density == 0.001:
            assert size * 8 / nnz <= 1.15 * entropy


def test_hostile_index_bytes_are_refused_or_valid(path: str) -> None:
    """Flips, cuts, extensions and noise give a WireError or a valid list, nothing else; 4,000 cases for each path."""
    rng = np.random.default_rng(7)
    tried = refused = 0
    for trial in range(1000):
        numel = int(rng.choice([10, 128, 1000, 2**32]))
        indices = positions(numel, int(min(numel, rng.integers(0, 400))), trial)
        for codec in SPARSE:
            if codec == IndexCodec.BITMAP and numel > 10**6:
                codec = IndexCodec.RICE
            data = encode(codec, indices, numel).numpy().copy()
            way = trial % 4
            if way == 0 and data.size:
                data[rng.integers(0, data.size)] ^= 1 << rng.integers(0, 8)
            elif way == 1:
                data = data[: int(rng.integers(0, data.size + 1))].copy()
            elif way == 2:
                data = np.concatenate([data, rng.integers(0, 256, 3, dtype=np.uint8)])
            else:
                data = rng.integers(0, 256, data.size, dtype=np.uint8)
            nnz = indices.numel() if trial % 5 else int(rng.integers(0, min(numel, 500) + 1))
            tried += 1
            try:
                got = decode(codec, torch.from_numpy(data), nnz, numel).to(torch.int64)
            except WireError:
                refused += 1
                continue
            assert got.numel() == nnz
            assert nnz == 0 or (int(got[-1]) < numel and bool((got[1:] > got[:-1]).all()))
    assert tried == 4000
    assert refused > 2000


@many
@given(
    n=st.sampled_from([0, 1, 7, 127, 128, 129, 1000]),
    kind=st.sampled_from(["normal", "zeros", "equal", "denormal", "wide", "ties"]),
    seed=seeds,
    codec=st.sampled_from(ValueCodec),
    offset=st.integers(0, 3),
)
def test_values_equal_the_reference_and_the_error_is_what_rounding_drops(
    path: str, n: int, kind: str, seed: int, codec: ValueCodec, offset: int
) -> None:
    values = vector(kind, n, seed, offset=offset)
    values = torch.where(torch.isfinite(values), values, torch.zeros_like(values)).contiguous()

    def run() -> tuple[torch.Tensor, float, torch.Tensor, torch.Tensor]:
        out = torch.empty(kernels.max_value_bytes(codec, n), dtype=torch.uint8)
        error = torch.empty(n, dtype=torch.float32)
        back = torch.empty(n, dtype=torch.float32)
        size, scale = kernels.encode_values(codec, values, out, error)
        kernels.decode_values(codec, out[:size], n, scale, back)
        return out[:size], scale, error, back

    mine, truth = run(), by_reference(path, run)
    assert mine[1] == truth[1]
    for got, want in zip((mine[0], mine[2], mine[3]), (truth[0], truth[2], truth[3]), strict=True):
        assert same_bits(got, want)
    assert same_bits(mine[2] + 0.0, (values - mine[3]) + 0.0)
    assert bool(torch.isfinite(mine[3]).all())


@pytest.mark.parametrize("length", [1023, 1024, 1025, 1279, 1280, 2048 + 7, 12_288, 65_537])
@pytest.mark.parametrize("seed", [0, 0xDEADBEEF])
def test_crc32c_of_lengths_at_which_its_ways_change(path: str, length: int, seed: int) -> None:
    data = bytes(np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8))
    assert by_reference(path, lambda: kernels.crc32c(data, seed)) == kernels.crc32c(data, seed)


def test_crc32c_is_castagnoli(path: str) -> None:
    assert kernels.crc32c(b"123456789") == 0xE3069283
    data = bytes(np.random.default_rng(0).integers(0, 256, 100_003, dtype=np.uint8))
    whole = kernels.crc32c(data)
    for cut in (0, 1, 7, 8, 4096, 99_999):
        assert kernels.crc32c(data[cut:], kernels.crc32c(data[:cut])) == whole
    assert by_reference(path, lambda: kernels.crc32c(data)) == whole
