"""Whole payloads: header + index bytes + value bytes."""

from __future__ import annotations

import torch

from sparsecomm.device import side_of
from sparsecomm.errors import WireError
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire.header import FLAG_ERROR, HEADER_BYTES, MAX_ERROR_BYTES, Header, write_header

__all__ = [
    "check_body",
    "choose_index_codec",
    "decode_body",
    "encode_error",
    "encode_payload",
    "max_payload_bytes",
]


def choose_index_codec(nnz: int, numel: int, given: IndexCodec | None = None) -> IndexCodec:
    """Returns the index codec expected to be smallest for nnz of numel positions, or the given one.

    All positions need no indices, whatever is given.
    """
    if nnz == numel:
        return IndexCodec.DENSE
    if given is not None:
        return given
    candidates = (IndexCodec.RICE, IndexCodec.BITMAP)
    return min(candidates, key=lambda c: kernels.estimate_index_bytes(c, nnz, numel))


def max_payload_bytes(index_codec: IndexCodec, value_codec: ValueCodec, nnz: int, numel: int) -> int:
    """Returns a bound on the payload's length in bytes, header included."""
    index = kernels.max_index_bytes(index_codec, nnz, numel)
    return HEADER_BYTES + index + kernels.max_value_bytes(value_codec, nnz)


def encode_payload(
    header: Header,
    indices: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    error: torch.Tensor,
    packed: torch.Tensor | None = None,
) -> None:
    """Writes a payload: the first HEADER_BYTES + header.body_bytes of `out`.

    Args:
        header: flags, codecs, ids and numel. Mutated: lengths, nnz, scale and checksum are filled in.
        indices: uint32, shape (nnz,), strictly ascending, all below header.numel.
        values: float32, shape (nnz,), finite.
        out: uint8, at least `max_payload_bytes` long. Mutated.
        error: float32, shape (nnz,). Receives value minus decoded value: what rounding drops.
        packed: for pairs on a GPU, room there as long as `out`: only the bytes that it then holds go to the host.
    """
    body = out[HEADER_BYTES:] if packed is None else packed
    index_bytes = kernels.encode_indices(header.index_codec, indices, header.numel, body)
    value_bytes, scale = kernels.encode_values(header.value_codec, values, body[index_bytes:], error)
    header.nnz = values.numel()
    header.index_bytes = index_bytes
    header.value_bytes = value_bytes
    header.value_scale = scale
    if packed is not None:
        body = out[HEADER_BYTES:]
        side_of(packed.device).fetch(packed[: header.body_bytes], body[: header.body_bytes])
    header.body_crc = kernels.crc32c(body[: index_bytes + value_bytes])
    write_header(header, out)


def encode_error(header: Header, message: str, out: torch.Tensor) -> None:
    """Writes a payload that tells the other ranks that this one failed, and why.

    Args:
        header: ids and numel of what was to be exchanged. Mutated: completed.
        message: cut to MAX_ERROR_BYTES of UTF-8.
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


def check_body(header: Header, body: torch.Tensor) -> None:
    """Checks a body's length and checksum against its header.

    Raises:
        WireError: names the sender and bucket.
    """
    where = {"rank": header.rank, "bucket": header.bucket}
    if body.numel() != header.body_bytes:
        raise WireError("length", body.numel(), f"the header announces {header.body_bytes} bytes", **where)
    crc = kernels.crc32c(body)
    if crc != header.body_crc:
        raise WireError("body_crc", hex(header.body_crc), f"the body's checksum is {crc:#x}", **where)


def decode_body(header: Header, body: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Decodes a body whose header has been read, checking everything in it.

    Args:
        header: from `read_header`.
        body: uint8, shape (header.body_bytes,).
        indices: uint32, shape (nnz,), on the host or a GPU. Mutated, on failure too.
        values: float32, shape (nnz,), beside them. Mutated, on failure too.

    Raises:
        WireError: names field, value, sender and bucket. Nothing but the two outputs was touched.
    """
    check_body(header, body)
    body = body.to(indices.device, non_blocking=True)  # the body itself where that is the host
    try:
        kernels.decode_indices(header.index_codec, body[: header.index_bytes], header.nnz, header.numel, indices)
        kernels.decode_values(header.value_codec, body[header.index_bytes :], header.nnz, header.value_scale, values)
    except WireError as error:
        raise error.at(rank=header.rank, bucket=header.bucket) from None
