"""The first round of every exchange: all headers to all ranks, so that all see the same disagreement or failure."""

from __future__ import annotations

from collections.abc import Hashable
from operator import attrgetter

import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives.allgather import allgather_bodies, allgather_fixed
from sparsecomm.errors import CollectiveMismatch, RemoteError, WireError
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps
from sparsecomm.wire import FLAG_ERROR, HEADER_BYTES, CollectiveKind, Header, check_body, read_header

__all__ = ["agree"]

_MUST_MATCH = ("world", "step", "bucket", "numel", "layout_hash", "collective")
_matched = attrgetter(*_MUST_MATCH)


def agree(
    channel: Channel, mine: Header, payload: torch.Tensor, arena: Arena, key: Hashable
) -> CollectiveSteps[list[Header]]:
    """Exchanges headers and checks that all ranks are in the same exchange. Collective.

    Args:
        channel: the ranks.
        mine: this rank's header.
        payload: uint8, this rank's whole payload, that header first.
        arena: gives the receive buffers.
        key: names them.

    Returns:
        The headers by rank, all consistent, none reporting an error.

    Raises:
        WireError: if a header is damaged; names the sender.
        AgreedError: raised on every rank alike: its cause is a CollectiveMismatch that lists what each rank is in,
            or a RemoteError that names the ranks that failed and why.
    """
    block = payload[:HEADER_BYTES]
    blocks = [block]
    if channel.size > 1:
        blocks = yield from allgather_fixed(channel, block, arena, (key, "headers"))
    headers = []
    for rank, block in enumerate(blocks):
        if rank == channel.rank:
            headers.append(mine)
            continue
        try:
            header = read_header(block)
        except WireError as error:
            raise error.at(rank=rank, bucket=mine.bucket) from None
        if header.rank != rank:
            raise WireError("rank", header.rank, "not the sender's", rank=rank, bucket=mine.bucket)
        headers.append(header)
    if any(h.flags & FLAG_ERROR for h in headers):
        yield from _raise_remote(channel, payload, headers, arena, key)
    _check_match(headers)
    return headers


def _check_match(headers: list[Header]) -> None:
    """Raises the same error on all ranks, since all hold the same headers."""
    # What is summed on its way must travel alike; a sparse payload says itself how it is written.
    dense = any(h.collective == CollectiveKind.DENSE for h in headers)
    first = _matched(headers[0])
    if all(_matched(h) == first for h in headers) and not (dense and len({h.value_codec for h in headers}) > 1):
        return
    differ = [f for f in (*_MUST_MATCH, "value_codec") if len({getattr(h, f) for h in headers}) > 1]
    lines = []
    for h in headers:
        values = ", ".join(f"{f} = {_show(f, getattr(h, f))}" for f in differ)
        lines.append(f"rank {h.rank}: {values}")
    raise AgreedError(
        CollectiveMismatch(
            f"ranks disagree on {', '.join(differ)} in bucket {headers[0].bucket} of step {headers[0].step}: "
            + "; ".join(lines)
            + ". Do all ranks build the same model, with the same options, and run the same steps?"
        )
    )


def _show(field: str, value: object) -> str:
    if field == "layout_hash":
        return f"{value:#018x}"
    return str(getattr(value, "name", value))


def _raise_remote(
    channel: Channel, payload: torch.Tensor, headers: list[Header], arena: Arena, key: Hashable
) -> CollectiveSteps[None]:
    """Fetches the messages of the ranks that failed and raises them."""
    lengths = [h.body_bytes if h.flags & FLAG_ERROR else 0 for h in headers]
    mine = payload[HEADER_BYTES : HEADER_BYTES + lengths[channel.rank]]
    bodies = yield from allgather_bodies(channel, mine, lengths, arena, (key, "errors"))
    parts = []
    for header, body in zip(headers, bodies, strict=True):
        if header.flags & FLAG_ERROR:
            check_body(header, body)
            text = bytes(body.numpy()).decode("utf-8", "replace")
            parts.append(f"rank {header.rank} failed in bucket {header.bucket} of step {header.step}: {text}")
    raise AgreedError(RemoteError("; ".join(parts)))
