"""Payloads of signs: they survive a round trip, and errors name every wrong field."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from helpers import sealed
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.exchange.method import blank_header, method_named
from sparsecomm.wire import (
    HEADER_BYTES,
    Header,
    add_signs,
    encode_signs,
    max_signs_bytes,
    read_header,
    read_spans,
)

Spans = list[tuple[int, int]]


def written(values: torch.Tensor, spans: Spans) -> tuple[Header, torch.Tensor]:
    header = blank_header(1, 2, 3, 7, values.numel(), method_named("sign").number)
    out = torch.full((max_signs_bytes(values.numel(), len(spans)),), 255, dtype=torch.uint8)
    encode_signs(header, values, spans, out)
    return header, out[: HEADER_BYTES + header.body_bytes]


def decoded(data: torch.Tensor) -> torch.Tensor:
    header, body = read_header(data), data[HEADER_BYTES:]
    out = torch.zeros(header.numel, dtype=torch.float32)
    add_signs(header, body, read_spans(header, body), out)
    return out


@st.composite
def situations(draw: st.DrawFn) -> tuple[torch.Tensor, Spans]:
    numel = draw(st.integers(1, 300) | st.sampled_from([65536, 65544, 140_001]))
    values = torch.randn(numel, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))), dtype=torch.float32)
    cuts = sorted(draw(st.sets(st.integers(0, numel), max_size=6)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    for start, end in spans:
        values[start:end] = 0.0
    return values, spans


@given(situations())
def test_what_is_written_is_read_back(situation: tuple[torch.Tensor, Spans]) -> None:
    values, spans = situation
    header, data = written(values, spans)
    assert read_header(data) == header
    if not bool(values.any()):
        assert header.body_bytes == 0
        return
    sent = torch.ones(len(values), dtype=torch.bool)
    for start, end in spans:
        sent[start:end] = False
    scale = float(np.float32(values.abs().double().sum() / int(sent.sum())))
    expected = torch.where(torch.signbit(values), -scale, scale) * sent
    assert torch.equal(decoded(data), expected)
    rest = values.clone()
    add_signs(header, data[HEADER_BYTES:], spans, rest, sub=True)
    assert torch.equal(rest, values - expected)


@given(situations(), st.integers(0, 10**6))
def test_any_flipped_bit_is_found(situation: tuple[torch.Tensor, Spans], bit: int) -> None:
    _, data = written(*situation)
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        decoded(data)


def resealed(data: torch.Tensor) -> torch.Tensor:
    """Updates the checksums of changed bytes."""
    struct.pack_into("<I", data.numpy(), 80, kernels.crc32c(data[HEADER_BYTES:]))
    return sealed(data)


GOOD = torch.cat(
    [torch.ones(4, dtype=torch.float32), torch.zeros(6, dtype=torch.float32), -torch.ones(11, dtype=torch.float32)]
)
SPANS = [(4, 8), (8, 10)]


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (52, "Q", 20, "nnz"),
        (52, "Q", 0, "value_bytes"),
        (60, "Q", 12, "index_bytes"),
        (60, "Q", 8 * 50, "index_bytes"),
        (68, "Q", 2, "value_bytes"),
        (7, "B", 1, "value_codec"),
        (8, "B", 0, "value_codec"),
        (24, "I", 5, "tag"),
        (76, "f", 0.0, "value_scale"),
        (76, "f", float("nan"), "value_scale"),
        (HEADER_BYTES, "I", 8, "span"),
        (HEADER_BYTES + 4, "I", 3, "span"),
        (HEADER_BYTES + 8, "I", 7, "span"),
        (HEADER_BYTES + 12, "I", 21, "span"),
        (HEADER_BYTES + 12, "I", 2**32 - 1, "span"),
        (HEADER_BYTES + 18, "B", 0x20, "padding"),
    ],
)
def test_every_field_is_checked_behind_correct_checksums(offset: int, form: str, value: float, field: str) -> None:
    _, data = written(GOOD, SPANS)
    assert len(data) == HEADER_BYTES + 16 + 3
    struct.pack_into("<" + form, data.numpy(), offset, value)
    with pytest.raises(WireError) as caught:
        decoded(resealed(data))
    assert caught.value.field == field


def test_other_collectives_have_no_scale_and_bare_ones_no_body() -> None:
    _, data = written(2 * GOOD, SPANS)
    for kind, field in ((1, "value_scale"), (7, "value_scale"), (10, "value_scale")):
        other = data.clone()
        other[6] = kind
        with pytest.raises(WireError) as caught:
            read_header(sealed(other))
        assert caught.value.field == field
    struct.pack_into("<f", data.numpy(), 76, 1.0)
    for kind in (7, 8, 10):
        data[6] = kind
        with pytest.raises(WireError) as caught:
            read_header(sealed(data))
        assert caught.value.field == "index_bytes"
