"""Parts of a split-reduce as bytes: round trips, hostile bytes, and the worked example of the document."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from worked_example import worked_part

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import Codecs, IndexCodec, ValueCodec
from sparsecomm.wire import PART_HEADER_BYTES, decode_part, encode_part, max_part_bytes, read_part_header

INDEX_CODECS = (None, IndexCodec.RICE, IndexCodec.BITPACK, IndexCodec.BITMAP, IndexCodec.RAW)


def part_of(
    span: int, nnz: int, seed: int, value_codec: ValueCodec, index_codec: IndexCodec | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bytes of a part, its positions and its decoded values."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.randperm(span, generator=g)[:nnz].sort().values.to(torch.uint32)
    values = torch.randn(nnz, generator=g, dtype=torch.float32)
    codecs = Codecs(value_codec, index_codec)
    out = torch.zeros(max_part_bytes(nnz, span, codecs), dtype=torch.uint8)
    error = torch.empty(nnz, dtype=torch.float32)
    written = encode_part(indices, values, span, codecs, out, error)
    return out[:written].clone(), indices, values - error


def decoded(data: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    header = read_part_header(data, span)
    body = data[PART_HEADER_BYTES:]
    if body.numel() != header.body_bytes:
        raise WireError("length", body.numel(), f"not {header.body_bytes}")
    pairs = (torch.empty(header.nnz, dtype=torch.uint32), torch.empty(header.nnz, dtype=torch.float32))
    decode_part(header, body, span, *pairs)
    return pairs


parts = st.tuples(
    st.integers(0, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    st.integers(0, 2**31),
    st.sampled_from(ValueCodec),
    st.sampled_from(INDEX_CODECS),
)


@given(parts)
def test_what_is_encoded_is_decoded(made: tuple[tuple[int, int], int, ValueCodec, IndexCodec | None]) -> None:
    (span, nnz), seed, value_codec, index_codec = made
    data, indices, values = part_of(span, nnz, seed, value_codec, index_codec)
    back_indices, back_values = decoded(data, span)
    assert torch.equal(back_indices.to(torch.int64), indices.to(torch.int64))
    torch.testing.assert_close(back_values, values, rtol=1e-6, atol=1e-7)
    if nnz == 0:
        assert data.numel() == PART_HEADER_BYTES


@given(parts)
def test_hostile_parts_are_refused_or_valid(
    made: tuple[tuple[int, int], int, ValueCodec, IndexCodec | None],
) -> None:
    """Every field and byte may be wrong, even with correct checksums."""
    (span, nnz), seed, value_codec, index_codec = made
    data, _, _ = part_of(span, nnz, seed, value_codec, index_codec)
    rng = random.Random(seed)
    for _ in range(40):
        hostile = data.clone()
        kind = rng.randrange(3)
        if kind == 0 and hostile.numel() > PART_HEADER_BYTES:
            hostile[rng.randrange(PART_HEADER_BYTES, hostile.numel())] ^= 1 << rng.randrange(8)
        elif kind == 1:
            hostile[rng.randrange(PART_HEADER_BYTES - 4)] = rng.randrange(256)
        else:
            offset, form = rng.choice([(0, "I"), (4, "I"), (8, "B"), (9, "B"), (12, "f")])
            limit = 256 if form == "B" else 2**31
            struct.pack_into("<" + form, hostile.numpy(), offset, rng.choice([0, 1, nnz + 1, span, 2**31 - 1]) % limit)
        body_crc = kernels.crc32c(hostile[PART_HEADER_BYTES:])
        struct.pack_into("<I", hostile.numpy(), 16, body_crc)
        struct.pack_into("<I", hostile.numpy(), 20, kernels.crc32c(hostile[:20]))
        try:
            indices, values = decoded(hostile, span)
        except WireError:
            continue
        positions = indices.to(torch.int64)
        assert bool((positions < span).all())
        assert bool((positions[1:] > positions[:-1]).all())
        assert bool(values.isfinite().all())


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (0, "I", 101, "nnz"),
        (0, "I", 2**32 - 1, "nnz"),
        (4, "I", 2**32 - 1, "index_bytes"),
        (8, "B", 5, "index_codec"),
        (8, "B", 0, "nnz"),
        (9, "B", 4, "value_codec"),
        (10, "H", 1, "reserved"),
        (12, "f", 0.0, "value_scale"),
        (12, "f", float("nan"), "value_scale"),
        (12, "f", -1.0, "value_scale"),
    ],
)
def test_every_field_is_checked_behind_a_correct_checksum(offset: int, form: str, value: float, field: str) -> None:
    data, _, _ = part_of(100, 10, 0, ValueCodec.FP16, IndexCodec.RICE)
    struct.pack_into("<" + form, data.numpy(), offset, value)
    struct.pack_into("<I", data.numpy(), 20, kernels.crc32c(data[:20]))
    with pytest.raises(WireError) as caught:
        read_part_header(data, 100)
    assert caught.value.field == field


@pytest.mark.parametrize("byte", range(PART_HEADER_BYTES))
def test_a_flipped_bit_in_a_header_is_seen(byte: int) -> None:
    data, _, _ = part_of(100, 10, 0, ValueCodec.FP16, IndexCodec.RICE)
    data[byte] ^= 16
    with pytest.raises(WireError, match="header_crc"):
        read_part_header(data, 100)


def test_the_document_shows_the_worked_part() -> None:
    assert worked_part() in (ROOT / "docs" / "wire-format.md").read_text()
