"""Whole bodies: positions and values to bytes, and the bodies of many ranks back. Formats: docs/wire-format.md."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from sparsecomm.errors import WireError
from sparsecomm.kernels import checks, checksum
from sparsecomm.kernels.api import BodyFormat, Described, Parts
from sparsecomm.kernels.paths import batch_kernels_for, host_kernels
from sparsecomm.kernels.sizes import max_index_bytes, max_value_bytes
from sparsecomm.types import IndexCodec

__all__ = ["decode_pairs", "encode_pairs"]

_LEAST_HEAD = 32


def encode_pairs(
    form: BodyFormat,
    indices: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    error: torch.Tensor | None = None,
    *,
    head: int,
) -> tuple[int, int, float, int]:
    """Writes positions, then values, as `encode_indices` and `encode_values` do, to memory of the host.

    Args:
        form: codecs, and length of the dense vector; a header, for example. Not mutated.
        indices: uint32, shape (nnz,), strictly ascending, below form.numel.
        values: float32, shape (nnz,), finite.
        out: uint8, on the host: `head` bytes for the caller, which may be overwritten with anything, then room for the
            longest body that the codecs can write. Mutated. Pinned if the pairs are on a GPU.
        error: as for `encode_values`.
        head: bytes to leave free in front of the body; at least 32 and a multiple of 8.

    Returns:
        Bytes of the positions, bytes of the values, the scale that `decode_values` needs, and the CRC32C of the body.

    Raises:
        KernelError: for unfit tensors, too small an output, or indices that are not ascending and below numel.

    Example:
        >>> from types import SimpleNamespace
        >>> from sparsecomm.types import IndexCodec, ValueCodec
        >>> form = SimpleNamespace(index_codec=IndexCodec.RAW, value_codec=ValueCodec.FP32, numel=10)
        >>> out = torch.zeros(88 + 8, dtype=torch.uint8)
        >>> encode_pairs(form, torch.tensor([2], dtype=torch.uint32), torch.ones(1), out, head=88)
        (4, 4, 1.0, 2338572200)
        >>> out[88:].tolist()
        [2, 0, 0, 0, 0, 0, 128, 63]
    """
    index_codec, numel = form.index_codec, form.numel
    nnz = checks.capacity(indices, values)
    need = head + max_index_bytes(index_codec, nnz, numel) + max_value_bytes(form.value_codec, nnz)
    if checks.byte_vec("out", out) < need or not out.is_cpu:
        checks.refuse(f"out has {out.numel()} bytes on {out.device}, need {need} on the host")
    if head < _LEAST_HEAD or head % 8:
        checks.refuse(f"head must be at least {_LEAST_HEAD} and a multiple of 8, got {head}")
    if error is not None and checks.value_vec("error", error) < nnz:
        checks.refuse(f"error has {error.numel()} elements, need nnz = {nnz}")
    if index_codec == IndexCodec.DENSE and nnz != numel:
        checks.refuse(f"the dense codec needs nnz == numel, got nnz = {nnz}, numel = {numel}")
    batch = batch_kernels_for(indices, values, values if error is None else error)
    if batch is None:
        return host_kernels().encode_body(form, indices, values, out[head:], error)
    index_bytes, value_bytes, scale = batch.encode_pairs(form, indices, values, out, error, head)
    return index_bytes, value_bytes, scale, checksum.crc32c(out[head : head + index_bytes + value_bytes])


def decode_pairs(
    payloads: Sequence[Described],
    bodies: Sequence[torch.Tensor],
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    *,
    verify: bool = False,
    known: tuple[int, torch.Tensor] | None = None,
) -> Parts:
    """Reads bodies as `decode_indices` and `decode_values` do, one after the other into two vectors.

    Nothing in the bodies and their descriptions is trusted.

    Args:
        payloads: descriptions of the bodies.
        bodies: uint8, on the host, positions first. Pinned if the outputs are on a GPU.
        out_indices: uint32, at least as long as all nnz together. Mutated, on failure too.
        out_values: float32, at least as long as all nnz together. Mutated, on failure too.
        verify: whether to check length and CRC32C of each body, except the known one, against its description. The
            host does that while a GPU decodes.
        known: number of a payload whose positions the caller has, and those positions. The host does not decode them
            again; a GPU does, at no cost, because it decodes all payloads in the same launches.

    Returns:
        Positions and values of each payload: slices of the outputs, except positions that were known on the host.

    Raises:
        WireError: for the first payload that fails a check, with its rank and bucket.
        KernelError: for unfit tensors.

    Example:
        >>> from types import SimpleNamespace
        >>> from sparsecomm.types import IndexCodec, ValueCodec
        >>> codecs = {"index_codec": IndexCodec.RAW, "value_codec": ValueCodec.BF16, "value_scale": 1.0}
        >>> payloads = [SimpleNamespace(rank=r, bucket=0, nnz=1, numel=9, index_bytes=4, **codecs) for r in (0, 1)]
        >>> bodies = torch.tensor([[2, 0, 0, 0, 128, 63], [7, 0, 0, 0, 0, 192]], dtype=torch.uint8)
        >>> indices, values = torch.empty(2, dtype=torch.uint32), torch.empty(2)
        >>> parts = decode_pairs(payloads, list(bodies), indices, values)
        >>> [(i.tolist(), v.tolist()) for i, v in parts], indices.tolist(), values.tolist()
        ([([2], [1.0]), ([7], [-2.0])], [2, 7], [1.0, -2.0])
    """
    checks.index_vec("out_indices", out_indices)
    checks.value_vec("out_values", out_values)
    _check_fit(payloads, bodies, out_indices, out_values)
    own = -1 if known is None else known[0]
    verified = {i for i in range(len(payloads)) if verify and i != own}
    batch = batch_kernels_for(out_indices, out_values)
    if batch is not None:
        return batch.decode_pairs(payloads, bodies, out_indices, out_values, verified)
    return _decode_on_host(payloads, bodies, out_indices, out_values, verified, known or (-1, out_indices))


def _decode_on_host(
    payloads: Sequence[Described],
    bodies: Sequence[torch.Tensor],
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    verified: Container[int],
    known: tuple[int, torch.Tensor],
) -> Parts:
    """Verifies and decodes one payload after the other; `known` has the number -1 if no positions are known."""
    host, parts, start = host_kernels(), [], 0
    own, positions = known
    for i, (payload, body) in enumerate(zip(payloads, bodies, strict=True)):
        end = start + payload.nnz
        values, indices = out_values[start:end], positions if i == own else out_indices[start:end]
        if i in verified:
            checksum.check_body(payload, body)
        try:
            host.decode_body(payload, body, None if i == own else indices, values)
        except WireError as error:
            raise error.at(rank=payload.rank, bucket=payload.bucket) from None
        parts.append((indices, values))
        start = end
    return parts


def _check_fit(
    payloads: Sequence[Described], bodies: Sequence[torch.Tensor], out_indices: torch.Tensor, out_values: torch.Tensor
) -> None:
    """Raises WireError for counts that cannot be, KernelError for too small an output, before anything is decoded."""
    for payload, body in zip(payloads, bodies, strict=True):
        try:
            checks.wire_counts(payload.nnz, payload.numel)
        except WireError as error:
            raise error.at(rank=payload.rank, bucket=payload.bucket) from None
        checks.byte_vec("bodies", body)
    total = sum(payload.nnz for payload in payloads)
    if min(out_indices.numel(), out_values.numel()) < total:
        room = f"{out_indices.numel()} and {out_values.numel()}"
        checks.refuse(f"out_indices and out_values have {room} elements, need {total}, all nnz together")
