"""Whole payloads: positions and values to bytes, and the payloads of many ranks back. Formats: docs/wire-format.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sparsecomm.errors import WireError
from sparsecomm.kernels import checks
from sparsecomm.kernels.api import Described, Parts
from sparsecomm.kernels.combine import crc32c
from sparsecomm.kernels.paths import batch_kernels_for, host_kernels
from sparsecomm.kernels.sizes import max_index_bytes, max_value_bytes
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["decode_pairs", "encode_pairs"]

_LEAST_HEAD = 32


def encode_pairs(
    index_codec: IndexCodec,
    value_codec: ValueCodec,
    indices: torch.Tensor,
    values: torch.Tensor,
    numel: int,
    out: torch.Tensor,
    error: torch.Tensor | None = None,
    *,
    head: int,
) -> tuple[int, int, float, int]:
    """Writes positions, and values behind them, as `encode_indices` and `encode_values` do, to the host.

    Args:
        index_codec: how positions are written.
        value_codec: how values are written.
        indices: uint32, shape (nnz,), strictly ascending, below numel.
        values: float32, shape (nnz,), finite.
        numel: length of the dense vector, at most 2**32.
        out: uint8, on the host: `head` bytes for the caller, which may be overwritten with anything, then room for the
            most that the codecs can take. Mutated. Pinned, if the pairs are on a GPU.
        error: as for `encode_values`.
        head: bytes to leave free; at least 32, a multiple of 8.

    Returns:
        Bytes of the positions, bytes of the values, the scale that `decode_values` needs, and the CRC32C of all bytes.

    Raises:
        KernelError: for unfit tensors, too small an output, or indices that are not ascending and below numel.

    Example:
        >>> out, pairs = torch.zeros(88 + 8, dtype=torch.uint8), (torch.tensor([2], dtype=torch.uint32), torch.ones(1))
        >>> encode_pairs(IndexCodec.RAW, ValueCodec.FP32, *pairs, 10, out, head=88)
        (4, 4, 1.0, 2338572200)
        >>> out[88:].tolist()
        [2, 0, 0, 0, 0, 0, 128, 63]
    """
    nnz = checks.capacity(indices, values)
    need = head + max_index_bytes(index_codec, nnz, numel) + max_value_bytes(value_codec, nnz)
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
        return host_kernels().encode_body(index_codec, value_codec, indices, values, numel, out[head:], error)
    index_bytes, value_bytes, scale = batch.encode_pairs(
        index_codec, value_codec, indices, values, numel, out, error, head
    )
    return index_bytes, value_bytes, scale, crc32c(out[head : head + index_bytes + value_bytes])


def decode_pairs(
    payloads: Sequence[Described],
    bodies: Sequence[torch.Tensor],
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    *,
    check: Callable[[int], None] | None = None,
    known: tuple[int, torch.Tensor] | None = None,
) -> Parts:
    """Reads payloads as `decode_indices` and `decode_values` do, one after the other into two vectors.

    Trusts nothing in the bodies and their descriptions.

    Args:
        payloads: what each of them is said to be.
        bodies: uint8, on the host: the bytes of each, positions first. Pinned, if the outputs are on a GPU.
        out_indices: uint32, at least as long as all nnz together. Mutated, on failure too.
        out_values: float32, likewise.
        check: called with the number of each payload but the known one, and raises if something else is wrong with
            it. A GPU decodes meanwhile.
        known: a payload whose positions are at hand, and these; a GPU decodes them all the same, which costs nothing.

    Returns:
        Positions and values of each payload: slices of the outputs, but for positions that were known.

    Raises:
        WireError: of the first payload that is not what it should be, with its rank and bucket.
        KernelError: for unfit tensors.

    Example:
        >>> from types import SimpleNamespace
        >>> codecs = {"index_codec": IndexCodec.RAW, "value_codec": ValueCodec.BF16, "value_scale": 1.0}
        >>> said = [SimpleNamespace(rank=r, bucket=0, nnz=1, numel=9, index_bytes=4, **codecs) for r in (0, 1)]
        >>> bodies = torch.tensor([[2, 0, 0, 0, 128, 63], [7, 0, 0, 0, 0, 192]], dtype=torch.uint8)
        >>> indices, values = torch.empty(2, dtype=torch.uint32), torch.empty(2)
        >>> parts = decode_pairs(said, list(bodies), indices, values)
        >>> [(i.tolist(), v.tolist()) for i, v in parts], indices.tolist(), values.tolist()
        ([([2], [1.0]), ([7], [-2.0])], [2, 7], [1.0, -2.0])
    """
    checks.index_vec("out_indices", out_indices)
    checks.value_vec("out_values", out_values)
    own, positions = known or (-1, out_indices)
    _check_fit(payloads, bodies, out_indices, out_values)
    batch = batch_kernels_for(out_indices, out_values)
    if batch is not None:
        checked = check or (lambda _: None)
        return batch.decode_pairs(payloads, bodies, out_indices, out_values, lambda i: None if i == own else checked(i))
    host, parts, start = host_kernels(), [], 0
    for i, (payload, body) in enumerate(zip(payloads, bodies, strict=True)):
        end = start + payload.nnz
        values, indices = out_values[start:end], positions if i == own else out_indices[start:end]
        if check is not None and i != own:
            check(i)
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
    """Refuses what a loop over payloads refuses on its way: bad counts, too little room."""
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
