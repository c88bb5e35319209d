"""Payloads of pairs: a header, then index bytes, then value bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecomm import kernels
from sparsecomm.kernels import check_body
from sparsecomm.types import Codecs, IndexCodec, ValueCodec
from sparsecomm.wire.header import FLAG_ERROR, HEADER_BYTES, MAX_ERROR_BYTES, Header, write_header

__all__ = [
    "body_bytes",
    "check_body",
    "choose_index_codec",
    "decode_bodies",
    "decode_body",
    "encode_error",
    "encode_payload",
    "largest_value",
    "max_payload_bytes",
]


def choose_index_codec(nnz: int, numel: int, given: IndexCodec | None = None) -> IndexCodec:
    """Returns the given index codec, or the one with the fewest expected bytes for nnz of numel positions.

    If nnz equals numel, returns IndexCodec.DENSE in any case, since no indices are needed.
    """
    if nnz == numel:
        return IndexCodec.DENSE
    if given is not None:
        return given
    candidates = (IndexCodec.RICE, IndexCodec.BITMAP)
    return min(candidates, key=lambda c: kernels.estimate_index_bytes(c, nnz, numel))


def max_payload_bytes(index_codec: IndexCodec, value_codec: ValueCodec, nnz: int, numel: int) -> int:
    """Returns the largest possible length of a payload in bytes, header included."""
    index = kernels.max_index_bytes(index_codec, nnz, numel)
    return HEADER_BYTES + index + kernels.max_value_bytes(value_codec, nnz)


def encode_payload(
    header: Header, indices: torch.Tensor, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor
) -> None:
    """Writes a payload into the first HEADER_BYTES + header.body_bytes of `out`.

    Args:
        header: flags, codecs, ids and numel. Mutated: lengths, nnz, scale and checksum are filled in.
        indices: uint32, shape (nnz,), strictly ascending, all below header.numel; on the host or a GPU.
        values: float32, shape (nnz,), finite, on the same device.
        out: uint8, at least `max_payload_bytes` long, on the host; pinned for pairs on a GPU. Mutated.
        error: float32, shape (nnz,), on the same device. Mutated: receives the rounding, value minus decoded value.
    """
    header.nnz = values.numel()
    header.index_bytes, header.value_bytes, header.value_scale, header.body_crc = kernels.encode_pairs(
        header, indices, values, out, error, head=HEADER_BYTES
    )
    write_header(header, out)


def encode_error(header: Header, message: str, out: torch.Tensor) -> None:
    """Writes a payload with the error message of a rank that failed.

    Args:
        header: ids and numel of the failed exchange. Mutated: completed.
        message: error message; cut to MAX_ERROR_BYTES of UTF-8.
        out: uint8, at least HEADER_BYTES + MAX_ERROR_BYTES long. Mutated.
    """
    text = message.encode("utf-8", "replace")[:MAX_ERROR_BYTES]
    out[HEADER_BYTES : HEADER_BYTES + len(text)] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)[
        : len(text)
    ]
    header.flags |= FLAG_ERROR
    header.nnz = header.index_bytes = 0
    header.value_bytes = len(text)
    header.value_scale = 1.0
    header.body_crc = kernels.crc32c(out[HEADER_BYTES : HEADER_BYTES + len(text)])
    write_header(header, out)


def decode_body(header: Header, body: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Checks and decodes a body. All tensors are on the host.

    Args:
        header: header of the body, from `read_header`.
        body: uint8, shape (header.body_bytes,).
        indices: uint32, shape (nnz,). Mutated, on failure too.
        values: float32, shape (nnz,). Mutated, on failure too.

    Raises:
        WireError: the body is damaged. The error names field, value, sender and bucket.
    """
    check_body(header, body)
    kernels.decode_pairs([header], [body], indices, values)


def decode_bodies(
    headers: Sequence[Header],
    bodies: Sequence[torch.Tensor],
    indices: torch.Tensor,
    values: torch.Tensor,
    own: tuple[int, torch.Tensor],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Checks and decodes the bodies of all ranks. On a GPU this takes as many launches as a single body.

    Args:
        headers: headers of the bodies, from `read_header`.
        bodies: uint8, on the host; pinned for outputs on a GPU.
        indices: uint32, on the host or a GPU, as long as all nnz together. Mutated, on failure too.
        values: float32, on the same device and of the same length. Mutated, on failure too.
        own: number of the body that this rank has written, and the positions in it.

    Returns:
        The positions and values of every rank.

    Raises:
        WireError: a body is damaged. The error names field, value, sender and bucket of the first one.
    """
    return kernels.decode_pairs(headers, bodies, indices, values, verify=True, known=own)


def largest_value(header: Header, body: torch.Tensor) -> float:
    """Returns a number that no value of a body exceeds in absolute size. Reads the bytes, so it waits for no device.

    Args:
        header: header of the body.
        body: uint8, on the host, decoded without an error before.
    """
    if not header.nnz:
        return 0.0
    if header.value_codec == ValueCodec.FP16:
        return torch.finfo(torch.float16).max * header.value_scale
    octets = body[header.index_bytes : header.body_bytes]
    if header.value_codec == ValueCodec.INT8:
        scales = octets[: kernels.max_value_bytes(ValueCodec.INT8, header.nnz) - header.nnz]
        return 127.0 * float(scales.clone().view(torch.float32).max())
    dtype = torch.float32 if header.value_codec == ValueCodec.FP32 else torch.bfloat16
    return float(octets.clone().view(dtype).abs().max())  # cloned, since the bytes may begin anywhere


def body_bytes(nnz: int, numel: int, codecs: Codecs) -> int:
    """Returns the expected bytes of a body with nnz uniform positions among `numel`, values included."""
    codec = choose_index_codec(nnz, numel, codecs.indices)
    return kernels.estimate_index_bytes(codec, nnz, numel) + kernels.max_value_bytes(codecs.values, nnz)
