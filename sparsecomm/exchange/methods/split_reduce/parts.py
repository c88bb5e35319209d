"""Parts on their way: every rank sends each of some others a part of known span and unknown length.

Cost: two messages a part, its header and its body; nothing but the header if it is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsecomm.errors import WireError
from sparsecomm.exchange.methods.split_reduce.context import Context
from sparsecomm.transport import Channel, CollectiveSteps, Request
from sparsecomm.types import Pairs
from sparsecomm.wire import PART_HEADER_BYTES, PartHeader, decode_part, read_part_header

__all__ = ["Arrival", "decode_pairs", "exchange_parts", "read_header_of", "shifted"]


_WINDOW = 8  # destinations in flight: enough to keep a link busy, few enough not to flood a receiver


def shifted(indices: torch.Tensor, offset: int, out: torch.Tensor) -> torch.Tensor:
    """Writes indices moved by an offset, which may be negative; torch cannot add uint32, numpy can.

    Args:
        indices: uint32, shape (nnz,).
        offset: what to add; all results must be in the range of uint32.
        out: uint32, shape (nnz,). Mutated; may be `indices`.

    Returns:
        `out`.
    """
    np.add(indices.numpy(), np.uint32(offset % 2**32), out=out.numpy())  # modulo 2^32, so that it subtracts, too
    return out


def decode_pairs(header: PartHeader, body: torch.Tensor, span: int, out: Pairs, *, rank: int, bucket: int) -> None:
    """Decodes a part.

    Args:
        header: of the part.
        body: uint8.
        span: elements that the part is of.
        out: as long as the part has nonzeros. Mutated.
        rank: who encoded it, for errors.
        bucket: for errors.

    Raises:
        WireError: if anything in it is wrong.
    """
    try:
        decode_part(header, body, span, *out)
    except WireError as error:
        raise error.at(rank=rank, bucket=bucket) from None


def read_header_of(data: torch.Tensor, span: int, *, rank: int, bucket: int) -> PartHeader:
    """Reads a part's header; its errors name rank and bucket."""
    try:
        return read_part_header(data, span)
    except WireError as error:
        raise error.at(rank=rank, bucket=bucket) from None


@dataclass(frozen=True, slots=True)
class Arrival:
    """A part that has come.

    Attributes:
        source: who sent it.
        header: read and checked.
        head: the header's bytes.
        body: not checked yet.
    """

    source: int
    header: PartHeader
    head: torch.Tensor
    body: torch.Tensor


def exchange_parts(
    context: Context,
    name: str,
    outgoing: Mapping[int, torch.Tensor],
    sources: Mapping[int, int],
    arrived: Callable[[list[Arrival]], None],
) -> CollectiveSteps[None]:
    """Sends parts to some ranks and receives parts from some. Collective; all ranks call it together.

    1. In turn i, send to ranks r + 8 i + 1 .. r + 8 i + 8, receive from ranks r - 8 i - 1 .. r - 8 i - 8: headers.
    2. The headers that have come say how long the bodies are: receive those beside the headers of the next turn.
    3. Hand over what has come while the next is under way.

    A rank waits in turn i only for what others send in their turn i, so none waits for one that waits for it.

    Args:
        context: the ranks and the buffers.
        name: names the buffers.
        outgoing: a part's bytes by destination.
        sources: by rank that sends a part here, the span of that part.
        arrived: called with a turn's parts, which hold only until it returns.

    Raises:
        WireError: if a header is damaged; names the sender.
    """
    size, turns = context.channel.size, _Turns(context, name, outgoing, sources)
    coming: list[Arrival] = []
    pending: list[Request] = []  # sends of the turn before, bodies that its headers announced
    for turn, first in enumerate(range(1, size, _WINDOW)):
        distances = range(first, min(first + _WINDOW, size))
        heads = turns.receive_headers(turn, distances)
        sends = turns.send(distances)
        if heads or pending:
            yield [*pending, *(request for _, _, request in heads)]
        if coming:
            arrived(coming)
        coming, bodies = turns.receive_bodies(turn, heads)
        pending = [*sends, *bodies]
    if pending:
        yield pending
    if coming:
        arrived(coming)


class _Turns:
    """The requests of one `exchange_parts`, turn by turn. Buffers of two turns alternate."""

    def __init__(
        self, context: Context, name: str, outgoing: Mapping[int, torch.Tensor], sources: Mapping[int, int]
    ) -> None:
        self._context, self._outgoing, self._sources = context, outgoing, sources
        self._key = (context.bucket, name)
        self._heads = context.arena.get((self._key, "part headers"), 2 * _WINDOW * PART_HEADER_BYTES, torch.uint8)

    def receive_headers(self, turn: int, distances: range) -> list[tuple[int, torch.Tensor, Request]]:
        """Starts to receive the headers of a turn. Returns source, buffer and request of each."""
        channel, started = self._context.channel, []
        for slot, distance in enumerate(distances):
            source = (channel.rank - distance) % channel.size
            if source in self._sources:
                at = (turn % 2 * _WINDOW + slot) * PART_HEADER_BYTES
                head = self._heads[at : at + PART_HEADER_BYTES]
                started.append((source, head, channel.irecv(head, source)))
        return started

    def send(self, distances: range) -> list[Request]:
        """Starts to send the parts of a turn."""
        channel, started = self._context.channel, []
        for distance in distances:
            dest = (channel.rank + distance) % channel.size
            part = self._outgoing.get(dest)
            if part is not None:
                started += _send(channel, part, dest)
        return started

    def receive_bodies(
        self, turn: int, heads: Sequence[tuple[int, torch.Tensor, Request]]
    ) -> tuple[list[Arrival], list[Request]]:
        """Reads a turn's headers and starts to receive the bodies that they announce."""
        context, bucket = self._context, self._context.bucket
        headers = [read_header_of(head, self._sources[s], rank=s, bucket=bucket) for s, head, _ in heads]
        total = sum(h.body_bytes for h in headers)
        buffer = context.arena.get((self._key, "part bodies", turn % 2), total, torch.uint8, reserve=2 * total)
        coming, started, offset = [], [], 0
        for (source, head, _), header in zip(heads, headers, strict=True):
            body = buffer[offset : offset + header.body_bytes]
            offset += header.body_bytes
            coming.append(Arrival(source, header, head, body))
            if header.body_bytes:
                started.append(context.channel.irecv(body, source))
        return coming, started


def _send(channel: Channel, part: torch.Tensor, dest: int) -> list[Request]:
    requests = [channel.isend(part[:PART_HEADER_BYTES], dest)]
    if part.numel() > PART_HEADER_BYTES:
        requests.append(channel.isend(part[PART_HEADER_BYTES:], dest))
    return requests
