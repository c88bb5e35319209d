"""The header: it survives a round trip, every field is checked, and errors name the field and its value."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import sealed
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.exchange.method import method_named
from sparsecomm.types import MAX_NUMEL, IndexCodec, ValueCodec
from sparsecomm.wire import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    Header,
    read_header,
    write_header,
)

GOOD = Header(
    flags=0,
    collective=method_named("allgather").number,
    value_codec=ValueCodec.FP32,
    index_codec=IndexCodec.RAW,
    rank=1,
    world=4,
    bucket=3,
    step=7,
    layout_hash=0xFEDCBA9876543210,
    numel=1000,
    nnz=10,
    index_bytes=40,
    value_bytes=40,
    body_crc=0xDEADBEEF,
)


def written(header: Header) -> torch.Tensor:
    out = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    write_header(header, out)
    return out


@st.composite
def headers(draw: st.DrawFn) -> Header:
    numel = draw(st.integers(0, MAX_NUMEL))
    nnz = draw(st.integers(0, numel))
    value_codec = draw(st.sampled_from(ValueCodec))
    index_codec = draw(st.sampled_from([c for c in IndexCodec if c != IndexCodec.DENSE or nnz == numel]))
    world = draw(st.integers(1, 2**32 - 1))
    return Header(
        flags=draw(st.sampled_from([0, FLAG_NONFINITE])),
        collective=method_named("allgather").number,
        value_codec=value_codec,
        index_codec=index_codec,
        rank=draw(st.integers(0, world - 1)),
        world=world,
        bucket=draw(st.integers(0, 2**32 - 1)),
        step=draw(st.integers(0, 2**64 - 1)),
        layout_hash=draw(st.integers(0, 2**64 - 1)),
        numel=numel,
        nnz=nnz,
        index_bytes=kernels.max_index_bytes(index_codec, nnz, numel),
        value_bytes=kernels.max_value_bytes(value_codec, nnz),
        value_scale=2.0 ** draw(st.integers(-126, 113)) if value_codec == ValueCodec.FP16 else 1.0,
        body_crc=draw(st.integers(0, 2**32 - 1)),
    )


@given(headers())
def test_what_is_written_is_read_back(header: Header) -> None:
    assert read_header(written(header)) == header
    assert header.body_bytes == header.index_bytes + header.value_bytes


@given(headers(), st.integers(0, 8 * HEADER_BYTES - 1))
def test_any_single_flipped_bit_is_found(header: Header, bit: int) -> None:
    data = written(header)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        read_header(data)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_a_short_header_is_refused(length: int) -> None:
    with pytest.raises(WireError, match=f"length = {length}"):
        read_header(written(GOOD)[:length])


def test_bytes_after_the_header_do_not_matter() -> None:
    longer = torch.cat([written(GOOD), torch.full((7,), 255, dtype=torch.uint8)])
    assert read_header(longer) == GOOD


# offset, struct format, value, the field that the error must name
HOSTILE: list[tuple[int, str, Any, str]] = [
    (0, "4s", b"SPCX", "magic"),
    (4, "B", 0, "version"),
    (4, "B", 2, "version"),
    (5, "B", 4, "flags"),
    (5, "B", 0x81, "flags"),
    (6, "B", 0, "collective"),
    (6, "B", 99, "collective"),
    (6, "B", method_named("split_reduce").number, "index_bytes"),
    (6, "B", method_named("ssar").number, "index_bytes"),
    (6, "B", method_named("chunked").number, "index_bytes"),
    (6, "B", method_named("shared_index").number, "index_bytes"),
    (7, "B", 4, "value_codec"),
    (8, "B", 5, "index_codec"),
    (9, "B", 1, "reserved"),
    (10, "H", 256, "reserved"),
    (24, "I", 1, "tag"),
    (12, "I", 4, "rank"),
    (12, "I", 2**32 - 1, "rank"),
    (16, "I", 0, "rank"),
    (44, "Q", MAX_NUMEL + 1, "numel"),
    (44, "Q", 2**64 - 1, "numel"),
    (52, "Q", 1001, "nnz"),
    (52, "Q", 2**64 - 1, "nnz"),
    (52, "Q", 11, "index_bytes value_bytes"),
    (8, "B", int(IndexCodec.DENSE), "nnz"),
    (60, "Q", 41, "index_bytes"),
    (60, "Q", 2**63, "index_bytes"),
    (68, "Q", 39, "value_bytes"),
    (68, "Q", 2**64 - 1, "value_bytes"),
    (7, "B", int(ValueCodec.FP16), "value_bytes"),
    (76, "f", 0.0, "value_scale"),
    (76, "f", -1.0, "value_scale"),
    (76, "f", math.inf, "value_scale"),
    (76, "f", math.nan, "value_scale"),
    (6, "B", method_named("dense").number, "nnz"),
]


@pytest.mark.parametrize(("offset", "form", "value", "fields"), HOSTILE)
def test_every_field_is_checked_behind_a_correct_checksum(offset: int, form: str, value: Any, fields: str) -> None:
    data = written(GOOD)
    struct.pack_into("<" + form, data.numpy(), offset, value)
    with pytest.raises(WireError) as caught:
        read_header(sealed(data))
    assert caught.value.field in fields.split()
    assert repr(caught.value.value) in str(caught.value)
    assert caught.value.rank is None


def test_a_wrong_checksum_is_named() -> None:
    data = written(GOOD)
    data[84:] ^= 255
    with pytest.raises(WireError, match="header_crc"):
        read_header(data)


def test_an_error_header_may_carry_a_message_and_nothing_else() -> None:
    message = replace(GOOD, flags=FLAG_ERROR, nnz=0, index_bytes=0, value_bytes=MAX_ERROR_BYTES)
    assert read_header(written(message)).body_bytes == MAX_ERROR_BYTES
    assert (
        read_header(written(replace(message, collective=method_named("dense").number, value_bytes=0))).body_bytes == 0
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"value_bytes": MAX_ERROR_BYTES + 1}, "value_bytes"),
        ({"value_bytes": 2**40}, "value_bytes"),
        ({"nnz": 1}, "nnz"),
        ({"index_bytes": 1}, "index_bytes"),
    ],
)
def test_an_error_header_names_the_field_that_is_too_much(changes: dict[str, int], field: str) -> None:
    message = replace(GOOD, flags=FLAG_ERROR, nnz=0, index_bytes=0, value_bytes=5)
    with pytest.raises(WireError) as caught:
        read_header(written(replace(message, **changes)))
    assert (caught.value.field, caught.value.value) == (field, changes[field])


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"nnz": 1}, "nnz"), ({"index_bytes": 9}, "index_bytes"), ({"value_bytes": 8}, "value_bytes")],
)
def test_a_dense_header_names_the_field_that_is_too_much(changes: dict[str, int], field: str) -> None:
    dense = replace(GOOD, collective=method_named("dense").number, nnz=0, index_bytes=0, value_bytes=0)
    assert read_header(written(dense)) == dense
    with pytest.raises(WireError) as caught:
        read_header(written(replace(dense, **changes)))
    assert (caught.value.field, caught.value.value) == (field, changes[field])


@pytest.mark.parametrize("codec", [ValueCodec.FP32, ValueCodec.BF16, ValueCodec.INT8])
def test_a_scale_that_its_codec_does_not_use_must_be_one(codec: ValueCodec) -> None:
    """docs/wire-format.md: "factor on decoded fp16 values, 1 otherwise"."""
    header = replace(GOOD, value_codec=codec, value_bytes=kernels.max_value_bytes(codec, GOOD.nnz), value_scale=2.0)
    with pytest.raises(WireError, match=r"value_scale = 2\.0"):
        read_header(written(header))
