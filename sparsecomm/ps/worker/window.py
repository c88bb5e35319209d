"""Reads a server's parameters from its window. protocol/board.py has the layout."""

from __future__ import annotations

import torch

from sparsecomm.ps.protocol.board import HEAD_BYTES
from sparsecomm.ps.worker.link import Steps
from sparsecomm.transport.mailbox.window import Get, Window

__all__ = ["read_board"]

_TRIES = 8


def read_board(
    window: Window, rank: int, out: torch.Tensor, slowest: int | None, server: str, torn: list[int]
) -> Steps[int | None]:
    """Reads a shard once its slowest worker has reached a clock.

    A read that meets an update is torn and is done again, up to `_TRIES` times.

    Args:
        window: This rank's window.
        rank: Rank of the server.
        out: float32, shape (numel,). Mutated; its content is valid only if a version is returned.
        slowest: Clock that all workers must have reached; None for no such bound.
        server: The server in words, for messages.
        torn: One element, to which the number of torn reads is added. Mutated.

    Returns:
        The version read; None after too many torn reads.
    """
    before, after = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    tries = 0
    while tries < _TRIES:
        yield from _complete(window.get(rank, 0, before), server)
        if slowest is not None and int(before[2]) < slowest:
            yield f"workers that are behind, at {server}"
            continue
        tries += 1
        if int(before[0]) % 2 == 0:
            yield from _complete(window.get(rank, HEAD_BYTES, out), server)
            yield from _complete(window.get(rank, 0, after), server)
            if torch.equal(before[:2], after[:2]):
                return int(before[1])
        torn[0] += 1
        yield f"a moment in which {server} does not update"
    return None


def _complete(get: Get, server: str) -> Steps[None]:
    while not get.test():
        yield f"a one-sided read from {server}"
