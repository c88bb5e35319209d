"""A barrier with a deadline that fails alone: it leaves nothing in flight that a later operation could meet."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from typing_extensions import override

from sparsecomm.errors import CommTimeout
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps, Request

__all__ = ["meet"]


class _Until(Request):
    """Other requests, or a moment, whichever comes first."""

    def __init__(self, requests: Sequence[Request], until: float) -> None:
        self.peer = next((r.peer for r in requests), None)
        self._requests = list(requests)
        self._until = until

    @override
    def test(self) -> bool:
        self._requests = [r for r in self._requests if not r.test()]
        return not self._requests or time.monotonic() >= self._until

    @override
    def describe(self) -> str:
        return ", ".join(r.describe() for r in self._requests)

    @override
    def cancel(self) -> None:
        for request in self._requests:
            request.cancel()


def meet(channel: Channel, limit: float, wait_all: bool) -> CollectiveSteps[None]:
    """Waits for all ranks: rank 0 hears from all others and answers them. Collective.

    Args:
        channel: Ranks that take part.
        limit: Seconds that a rank waits.
        wait_all: Whether rank 0 names all ranks that did not come, not only the first.

    Raises:
        AgreedError: with a `CommTimeout`, if ranks did not come. The words are torch's, which scripts may look for.
    """
    until = time.monotonic() + limit
    token = torch.zeros(1, dtype=torch.uint8)
    if channel.rank:
        yield [_Until([channel.isend(token, 0)], until)]
        answer = torch.zeros(1, dtype=torch.uint8)
        heard = channel.irecv(answer, 0)
        yield [_Until([heard], until)]
        if not heard.test():
            heard.cancel()
            reached = (
                f"Rank {channel.rank} successfully reached monitoredBarrier, but received errors while waiting for "
            )
            raise AgreedError(CommTimeout(f"{reached}send/recv from rank 0: no answer within {limit:g} s"))
        return
    tokens = [torch.zeros(1, dtype=torch.uint8) for _ in range(channel.size)]
    waits = {r: channel.irecv(tokens[r], r) for r in range(1, channel.size)}
    yield [_Until(list(waits.values()), until)]
    late = [r for r, request in waits.items() if not request.test()]
    for r in late:
        waits[r].cancel()
    if late:
        named = late if wait_all else late[:1]
        who = f"Rank{'s' if len(named) > 1 else ''} {', '.join(map(str, named))} failed to pass monitoredBarrier in"
        who = who if limit > 0 else f"Rank 0 timed out in monitoredBarrier, which waits for rank {late[0]}, after"
        raise AgreedError(CommTimeout(f"{who} {limit * 1000:g} ms"))
    yield [channel.isend(token, r) for r in waits]
