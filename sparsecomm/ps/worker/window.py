"""How a worker reads a server's parameters from its window."""

from __future__ import annotations

import torch

from sparsecomm.ps.protocol.board import HEAD_BYTES
from sparsecomm.ps.worker.client import Steps
from sparsecomm.transport.mailbox.window import Get, Window

__all__ = ["read_board"]


def read_board(
    window: Window, rank: int, out: torch.Tensor, slowest: int | None, whom: str, again: list[int]
) -> Steps[int | None]:
    """Reads a shard as soon as its slowest worker has come so far.

    Args:
        window: any rank's.
        rank: the server.
        out: float32, shape (numel,). Mutated; torn unless a version is returned.
        slowest: the clock that all workers must have reached; None for no such bound.
        whom: whom this waits for, in words.
        again: one element, the reads that were torn. Mutated.

    Returns:
        The version read; None after too many torn reads.
    """
    before, after = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    tries = 0
    while tries < _TRIES:
        yield from _complete(window.get(rank, 0, before), whom)
        if slowest is not None and int(before[2]) < slowest:
            yield f"workers that are behind, at {whom}"
            continue
        tries += 1
        if int(before[0]) % 2 == 0:
            yield from _complete(window.get(rank, HEAD_BYTES, out), whom)
            yield from _complete(window.get(rank, 0, after), whom)
            if torch.equal(before[:2], after[:2]):
                return int(before[1])
        again[0] += 1
        yield f"a moment in which {whom} does not update"
    return None


_TRIES = 8


def _complete(get: Get, whom: str) -> Steps[None]:
    while not get.test():
        yield f"a one-sided read from {whom}"
