"""A shard in a window, where workers read it without asking, and the check that no torn read is used (a seqlock).

In front of the values are three int64: a count that is odd while the values change, the version, and the clock of the
slowest worker. A reader takes the values if the count was even and is the same before and after.
"""

from __future__ import annotations

import torch

from sparsecomm.ps.client import Steps
from sparsecomm.ps.shard import Shard
from sparsecomm.transport.window import Get, Window

__all__ = ["Board", "board_bytes", "read_board"]

_HEAD = 64  # bytes, so that values are aligned
_TRIES = 8
_EVERYBODY = 1 << 62  # clock of the slowest worker when nobody is left


def board_bytes(numel: int) -> int:
    """Returns the bytes of window that a shard needs."""
    return _HEAD + 4 * numel


class Board:
    """The writing side.

    Args:
        window: of the server, at least `board_bytes` long. Its memory is mutated.
        numel: elements of the shard.
    """

    def __init__(self, window: Window, numel: int) -> None:
        self._window = window
        self._head = window.memory[:24].view(torch.int64)
        self._values = window.memory[_HEAD : board_bytes(numel)].view(torch.float32)
        self._head.fill_(0)
        self._shown = -1

    def show(self, shard: Shard) -> None:
        """Brings the window up to date."""
        self._head[2] = min(shard.clocks.values(), default=_EVERYBODY)
        if shard.ready and shard.version != self._shown:
            self._head[0] += 1
            self._window.sync()
            self._values.copy_(shard.values)
            self._head[1] = self._shown = shard.version
            self._window.sync()
            self._head[0] += 1
        self._window.sync()


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
            yield from _complete(window.get(rank, _HEAD, out), whom)
            yield from _complete(window.get(rank, 0, after), whom)
            if torch.equal(before[:2], after[:2]):
                return int(before[1])
        again[0] += 1
        yield f"a moment in which {whom} does not update"
    return None


def _complete(get: Get, whom: str) -> Steps[None]:
    while not get.test():
        yield f"a one-sided read from {whom}"
