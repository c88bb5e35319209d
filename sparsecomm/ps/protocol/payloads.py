"""Payloads of pushes and pulls: pairs of a shard to bytes, and bytes that are checked back to pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.ps.protocol.sharding import ShardSpec
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Codecs, Pairs
from sparsecomm.wire import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    Header,
    HeaderRules,
    check_body,
    check_pairs,
    choose_index_codec,
    encode_payload,
    max_payload_bytes,
    read_header,
    register_rules,
)

__all__ = ["PULL", "PUSH", "Origin", "all_positions", "decode", "encode"]

PUSH = HeaderRules(12, "PUSH", check_pairs)
"""Headers of a worker's push."""

PULL = HeaderRules(13, "PULL", check_pairs)
"""Headers of the payload that a worker pulls."""

register_rules(PUSH)
register_rules(PULL)

_EXPECTED = ("collective", "rank", "world", "bucket", "step", "numel", "layout_hash")


@dataclass(frozen=True, slots=True)
class Origin:
    """Sender, shard and step of a payload. The header names them, and the receiver checks them.

    Attributes:
        kind: PUSH or PULL.
        spec: The shard.
        rank: Rank of the sender.
        world: Number of ranks, as the sender counts them.
        step: Clock of the worker that pushes; version to which a pull brings the worker.
    """

    kind: HeaderRules
    spec: ShardSpec
    rank: int
    world: int
    step: int


def all_positions(numel: int) -> torch.Tensor:
    """Returns all positions of a shard, uint32, shape (numel,)."""
    return torch.arange(numel, dtype=torch.int64).to(torch.uint32)


def encode(
    origin: Origin, pairs: Pairs, codecs: Codecs, arena: Arena, *, nonfinite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a payload.

    Args:
        origin: Sender, shard and step.
        pairs: Positions in the shard, and their values.
        codecs: Codecs of positions and values.
        arena: Gives the buffers.
        nonfinite: Whether the gradient was not finite; `pairs` is then empty.

    Returns:
        The payload, uint8, and the values' rounding errors, float32, shape (nnz,). Both lie in the arena.
    """
    indices, values = pairs
    nnz, spec = values.numel(), origin.spec
    index_codec = choose_index_codec(nnz, spec.numel, codecs.indices)
    header = Header(
        flags=FLAG_NONFINITE if nonfinite else 0,
        collective=origin.kind.number,
        value_codec=codecs.values,
        index_codec=index_codec,
        rank=origin.rank,
        world=origin.world,
        bucket=spec.index,
        step=origin.step,
        layout_hash=spec.hash,
        numel=spec.numel,
        nnz=nnz,
        index_bytes=0,
        value_bytes=0,
    )
    most = max_payload_bytes(index_codec, codecs.values, nnz, spec.numel)
    out = arena.get(("payload", spec.index), most, torch.uint8)
    rounding = arena.get(("rounding", spec.index), nnz, torch.float32)
    encode_payload(header, indices, values, out, rounding)
    return out[: HEADER_BYTES + header.body_bytes], rounding


def decode(origin: Origin, data: torch.Tensor) -> tuple[Pairs, bool]:
    """Reads a payload and checks its origin.

    It decodes to new tensors and not straight into a sum, since damage at the end of a payload must change nothing.

    Args:
        origin: The sender, shard and step that the payload must name.
        data: The whole payload, uint8.

    Returns:
        The pairs, in new tensors, and whether the sender's gradient was not finite.

    Raises:
        WireError: If anything does not fit. It names field, value, sender and shard.
    """
    spec, rank = origin.spec, origin.rank
    try:
        header = read_header(data)
    except WireError as error:
        raise error.at(rank=rank, bucket=spec.index) from None
    found = [getattr(header, field) for field in _EXPECTED]
    expected = [origin.kind.number, rank, origin.world, spec.index, origin.step, spec.numel, spec.hash]
    if found != expected:
        field, is_, should = next(t for t in zip(_EXPECTED, found, expected, strict=True) if t[1] != t[2])
        raise WireError(field, is_, f"expected {should!r}", rank=rank, bucket=spec.index)
    if header.flags & FLAG_ERROR:
        raise WireError("flags", header.flags, "workers report failures otherwise", rank=rank, bucket=spec.index)
    check_body(header, data[HEADER_BYTES:])  # before it allocates as much as the header says
    indices = torch.empty(header.nnz, dtype=torch.uint32)
    values = torch.empty(header.nnz, dtype=torch.float32)
    kernels.decode_pairs([header], [data[HEADER_BYTES:]], indices, values)
    return (indices, values), bool(header.flags & FLAG_NONFINITE)
