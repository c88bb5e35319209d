"""Selections of a shard to payloads of wire/ and back, each checked against what the receiver expects."""

from __future__ import annotations

import torch

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol.sharding import ShardSpec
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    Header,
    HeaderRules,
    check_pairs,
    choose_index_codec,
    decode_body,
    encode_payload,
    max_payload_bytes,
    read_header,
    register_rules,
)

__all__ = ["PULL", "PUSH", "Selected", "decode", "encode", "everything"]

Selected = tuple[torch.Tensor, torch.Tensor]
"""Indices (uint32, ascending, relative to the shard) and values (float32)."""


PUSH = HeaderRules(12, "PUSH", check_pairs)
"""Headers of a worker's push."""

PULL = HeaderRules(13, "PULL", check_pairs)
"""Headers of the payload that a worker pulls."""

register_rules(PUSH)
register_rules(PULL)

_EXPECTED = ("collective", "rank", "world", "bucket", "step", "numel", "layout_hash")


def everything(numel: int) -> torch.Tensor:
    """Returns all positions of a shard, uint32, shape (numel,)."""
    return torch.arange(numel, dtype=torch.int64).to(torch.uint32)


def encode(
    kind: HeaderRules,
    spec: ShardSpec,
    selected: Selected,
    codec: ValueCodec,
    arena: Arena,
    *,
    rank: int,
    world: int,
    step: int,
    nonfinite: bool = False,
    index_codec: IndexCodec | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a payload.

    Args:
        kind: PUSH or PULL.
        spec: the shard.
        selected: what to write.
        codec: how to write the values.
        arena: gives the buffers.
        rank: sender.
        world: ranks in all.
        step: of a push the worker's clock, of a pull the version that it brings the worker to.
        nonfinite: whether the gradient was not finite; then nothing is selected.
        index_codec: how to write the positions; None for the smallest.

    Returns:
        The payload, uint8, and what rounding dropped, float32, shape (nnz,): both in the arena.
    """
    indices, values = selected
    nnz = values.numel()
    index_codec = choose_index_codec(nnz, spec.numel, index_codec)
    header = Header(
        flags=FLAG_NONFINITE if nonfinite else 0,
        collective=kind.number,
        value_codec=codec,
        index_codec=index_codec,
        rank=rank,
        world=world,
        bucket=spec.index,
        step=step,
        layout_hash=spec.hash,
        numel=spec.numel,
        nnz=nnz,
        index_bytes=0,
        value_bytes=0,
    )
    most = max_payload_bytes(index_codec, codec, nnz, spec.numel)
    out = arena.get(("payload", spec.index), most, torch.uint8)
    error = arena.get(("rounding", spec.index), nnz, torch.float32)
    encode_payload(header, indices, values, out, error)
    return out[: HEADER_BYTES + header.body_bytes], error


def decode(
    kind: HeaderRules, spec: ShardSpec, data: torch.Tensor, *, rank: int, world: int, step: int
) -> tuple[Selected, bool]:
    """Reads and checks a payload: nothing is believed that does not fit the shard and the sender.

    Args:
        kind: what it must be.
        spec: the shard it must be of.
        data: uint8, the whole payload.
        rank: the sender it must name.
        world: the number of ranks it must name.
        step: the step it must name.

    Returns:
        The selection, in new tensors, and whether the sender's gradient was not finite.

    Raises:
        WireError: names field, value, sender and shard.
    """
    try:
        header = read_header(data)
    except WireError as error:
        raise error.at(rank=rank, bucket=spec.index) from None
    found = [getattr(header, field) for field in _EXPECTED]
    expected = [kind.number, rank, world, spec.index, step, spec.numel, spec.hash]
    if found != expected:
        field, is_, should = next(t for t in zip(_EXPECTED, found, expected, strict=True) if t[1] != t[2])
        raise WireError(field, is_, f"expected {should!r}", rank=rank, bucket=spec.index)
    if header.flags & FLAG_ERROR:
        raise WireError("flags", header.flags, "workers report failures otherwise", rank=rank, bucket=spec.index)
    indices = torch.empty(header.nnz, dtype=torch.uint32)
    values = torch.empty(header.nnz, dtype=torch.float32)
    decode_body(header, data[HEADER_BYTES:], indices, values)
    return (indices, values), bool(header.flags & FLAG_NONFINITE)
