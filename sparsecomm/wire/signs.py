"""Signs: a header with the scale, the omitted spans, and one bit per element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import IndexCodec, Span, ValueCodec
from sparsecomm.wire.header import HEADER_BYTES, Header, write_header
from sparsecomm.wire.pairs import check_body

__all__ = ["SPAN_BYTES", "add_signs", "check_signs", "encode_signs", "max_signs_bytes", "read_spans"]

_BLOCK = 1 << 16  # elements that are unpacked at once, so that they are added while they are in the cache

SPAN_BYTES = 8
"""Bytes of an omitted span: its first and its last element."""


def check_signs(h: Header) -> None:
    """Checks a header of signs. There is a sign for each element or for none; the index bytes hold omitted spans."""
    if h.tag:
        raise WireError("tag", h.tag, "SIGN has none")
    if h.nnz not in (0, h.numel):
        raise WireError("nnz", h.nnz, f"there must be {h.numel} signs or none")
    if h.value_bytes != -(-h.nnz // 8):
        raise WireError("value_bytes", h.value_bytes, f"{h.nnz} signs need {-(-h.nnz // 8)}")
    if h.index_bytes % SPAN_BYTES or h.index_bytes > SPAN_BYTES * -(-h.nnz // 2):
        raise WireError(
            "index_bytes", h.index_bytes, f"must hold spans of {SPAN_BYTES} bytes, at most one per two of {h.nnz} signs"
        )
    if (h.value_codec, h.index_codec) != (ValueCodec.FP32, IndexCodec.RAW):
        raise WireError("value_codec", h.value_codec, "the codecs of signs are always fp32 and raw")


def max_signs_bytes(numel: int, spans: int) -> int:
    """Returns the largest possible length of a payload of signs in bytes, header included."""
    return HEADER_BYTES + SPAN_BYTES * spans + -(-numel // 8)


def encode_signs(header: Header, values: torch.Tensor, spans: Sequence[Span], out: torch.Tensor) -> None:
    """Writes the signs of all values and their mean magnitude, or only a header if all values are zero.

    Args:
        header: header of a SIGN exchange. Mutated: lengths, nnz, scale and checksum are filled in.
        values: float32, shape (header.numel,), finite, zero within the spans.
        spans: omitted spans, not empty, ascending, without overlaps.
        out: uint8, at least `max_signs_bytes` long. Mutated.
    """
    count = values.numel() - sum(end - start for start, end in spans)
    total = float(torch.linalg.vector_norm(values, ord=1, dtype=torch.float64)) if count else 0.0
    scale = float(np.float32(total / count)) if count else 0.0
    if scale > 0.0:
        first = SPAN_BYTES * len(spans)
        body = out[HEADER_BYTES:].numpy()
        body[:first] = np.array([[s, e - 1] for s, e in spans], dtype="<u4").reshape(-1).view(np.uint8)
        for start in range(0, values.numel(), _BLOCK):
            bits = np.packbits(np.signbit(values[start : start + _BLOCK].numpy()), bitorder="little")
            body[first + start // 8 : first + start // 8 + len(bits)] = bits
        header.nnz, header.index_bytes, header.value_bytes = values.numel(), first, -(-values.numel() // 8)
        header.value_scale = scale
    else:
        header.nnz = header.index_bytes = header.value_bytes = 0
        header.value_scale = 1.0
    header.body_crc = kernels.crc32c(out[HEADER_BYTES : HEADER_BYTES + header.body_bytes])
    write_header(header, out)


def read_spans(header: Header, body: torch.Tensor) -> list[Span]:
    """Checks a body of signs and returns its omitted spans.

    Raises:
        WireError: the body is damaged. The error names field, value, sender and bucket.
    """
    check_body(header, body)
    origin = {"rank": header.rank, "bucket": header.bucket}
    pairs = np.frombuffer(body[: header.index_bytes].numpy().tobytes(), dtype="<u4").reshape(-1, 2)
    spans, end = [], 0
    for first, last in pairs.tolist():
        if not end <= first <= last < header.numel:
            raise WireError("span", (first, last), f"must lie between {end} and {header.numel - 1}", **origin)
        end = last + 1
        spans.append((first, end))
    if header.numel % 8 and header.value_bytes and int(body[-1]) >> header.numel % 8:
        raise WireError("padding", int(body[-1]), "bits after the last sign must be zero", **origin)
    return spans


def add_signs(
    header: Header, body: torch.Tensor, spans: Sequence[Span], out: torch.Tensor, *, sub: bool = False
) -> None:
    """Adds scale times sign to every element outside the omitted spans.

    Args:
        header: header of the payload.
        body: uint8, checked by `read_spans`.
        spans: result of `read_spans`.
        out: float32, shape (header.numel,). Mutated.
        sub: whether to subtract instead.
    """
    if not header.nnz:
        return
    packed = body[header.index_bytes :].numpy()
    bits_of_scale = int(np.float32(-header.value_scale if sub else header.value_scale).view(np.int32))
    for start in range(0, header.numel, _BLOCK):
        end = min(start + _BLOCK, header.numel)
        bits = np.unpackbits(packed[start // 8 : -(-end // 8)], count=end - start, bitorder="little")
        # The sign of a float is its highest bit.
        term = torch.from_numpy(bits).to(torch.int32).bitwise_left_shift_(31).bitwise_xor_(bits_of_scale)
        values = term.view(torch.float32)
        for first, last in spans:
            if first < end and last > start:
                values[max(first - start, 0) : last - start] = 0.0
        out[start:end].add_(values)
