"""Exchange of parts between ranks. The receiver knows the span of a part, but not its length in bytes.

Cost: two messages per part, the header and the body; only the header if the part is empty.
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
    """Adds an offset to indices, with numpy, since torch cannot add uint32.

    Args:
        indices: uint32, shape (nnz,).
        offset: added to each index; may be negative. All results must be in the range of uint32.
        out: uint32, shape (nnz,). Mutated; may be `indices`.

    Returns:
        `out`.
    """
    np.add(indices.numpy(), np.uint32(offset % 2**32), out=out.numpy())  # modulo 2^32, so a negative offset subtracts
    return out


def decode_pairs(header: PartHeader, body: torch.Tensor, span: int, out: Pairs, *, rank: int, bucket: int) -> None:
    """Decodes a part.

    Args:
        header: header of the part.
        body: uint8, body of the part.
        span: length of the span of the part.
        out: indices and values, each of shape (nnz,). Mutated.
        rank: rank that encoded the part, for errors.
        bucket: bucket number, for errors.

    Raises:
        WireError: the part is damaged.
    """
    try:
        decode_part(header, body, span, *out)
    except WireError as error:
        raise error.at(rank=rank, bucket=bucket) from None


def read_header_of(data: torch.Tensor, span: int, *, rank: int, bucket: int) -> PartHeader:
    """Reads and checks the header of a part. A WireError names the rank and the bucket."""
    try:
        return read_part_header(data, span)
    except WireError as error:
        raise error.at(rank=rank, bucket=bucket) from None


@dataclass(frozen=True, slots=True)
class Arrival:
    """A received part.

    Attributes:
        source: rank that sent the part.
        header: the checked header.
        head: uint8, the bytes of the header.
        body: uint8, the body, not yet checked.
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

    1. In turn i, send parts to ranks r + 8 i + 1 .. r + 8 i + 8, and receive headers from ranks r - 8 i - 1 ..
       r - 8 i - 8.
    2. The headers give the lengths of the bodies. Receive the bodies together with the headers of the next turn.
    3. Pass the parts of a turn to `arrived` while those of the next turn travel.

    In turn i a rank waits only for messages that others send in their turn i, so ranks never wait in a circle.

    Args:
        context: channel, arena and bucket.
        name: part of the names of buffers.
        outgoing: encoded parts by destination.
        sources: span of the part from each rank that sends one to this rank.
        arrived: called with the parts of each turn, which are valid only until it returns.

    Raises:
        WireError: a header is damaged. The error names the sender.
    """
    size, turns = context.channel.size, _Turns(context, name, outgoing, sources)
    coming: list[Arrival] = []
    pending: list[Request] = []  # of the last turn: its sends, and the receives of the bodies
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
    """The requests of one call of `exchange_parts`, turn by turn. Consecutive turns use different buffers."""

    def __init__(
        self, context: Context, name: str, outgoing: Mapping[int, torch.Tensor], sources: Mapping[int, int]
    ) -> None:
        self._context, self._outgoing, self._sources = context, outgoing, sources
        self._key = (context.bucket, name)
        self._heads = context.arena.get((self._key, "part headers"), 2 * _WINDOW * PART_HEADER_BYTES, torch.uint8)

    def receive_headers(self, turn: int, distances: range) -> list[tuple[int, torch.Tensor, Request]]:
        """Starts to receive the headers of a turn. Returns the source, buffer and request of each header."""
        channel, started = self._context.channel, []
        for slot, distance in enumerate(distances):
            source = (channel.rank - distance) % channel.size
            if source in self._sources:
                at = (turn % 2 * _WINDOW + slot) * PART_HEADER_BYTES
                head = self._heads[at : at + PART_HEADER_BYTES]
                started.append((source, head, channel.irecv(head, source)))
        return started

    def send(self, distances: range) -> list[Request]:
        """Starts to send the parts of a turn and returns the requests."""
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
        """Reads the headers of a turn and starts to receive the bodies."""
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
