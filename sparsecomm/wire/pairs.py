"""Whole payloads: header + index bytes + value bytes."""

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
    header: Header, indices: torch.Tensor, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor
) -> None:
    """Writes a payload: the first HEADER_BYTES + header.body_bytes of `out`.

    Args:
        header: flags, codecs, ids and numel. Mutated: lengths, nnz, scale and checksum are filled in.
        indices: uint32, shape (nnz,), strictly ascending, all below header.numel; on the host or a GPU.
        values: float32, shape (nnz,), finite; beside them.
        out: uint8, at least `max_payload_bytes` long, on the host; for a GPU's pairs pinned. Mutated.
        error: float32, shape (nnz,), beside the values. Receives value minus decoded value: what rounding drops.
    """
    header.nnz = values.numel()
    header.index_bytes, header.value_bytes, header.value_scale, header.body_crc = kernels.encode_pairs(
        header, indices, values, out, error, head=HEADER_BYTES
    )
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


def decode_body(header: Header, body: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Decodes a body whose header has been read, checking everything in it. All tensors are on the host.

    Args:
        header: from `read_header`.
        body: uint8, shape (header.body_bytes,).
        indices: uint32, shape (nnz,). Mutated, on failure too.
        values: float32, shape (nnz,). Mutated, on failure too.

    Raises:
        WireError: names field, value, sender and bucket. Nothing but the two outputs was touched.
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
    """Decodes the bodies of all ranks, checking everything in them, with as few launches as if it were one.

    Args:
        headers: from `read_header`.
        bodies: uint8, on the host; for outputs on a GPU pinned.
        indices: uint32, on the host or a GPU, as long as all nnz together. Mutated, on failure too.
        values: float32, beside them, equally long. Mutated, on failure too.
        own: which of them this rank has written, and the positions in it.

    Returns:
        Every rank's positions and values.

    Raises:
        WireError: names field, value, sender and bucket of the first that is damaged. Nothing but the two outputs was
            touched.
    """
    return kernels.decode_pairs(headers, bodies, indices, values, verify=True, known=own)


def body_bytes(nnz: int, numel: int, codecs: Codecs) -> int:
    """Returns the expected bytes of a body of nnz uniform positions among `numel`, and their values."""
    codec = choose_index_codec(nnz, numel, codecs.indices)
    return kernels.estimate_index_bytes(codec, nnz, numel) + kernels.max_value_bytes(codecs.values, nnz)
