"""Shows a shard in a window, where workers read it without asking. protocol/board.py has the layout."""

from __future__ import annotations

import torch

from sparsecomm.ps.protocol.board import EVERYBODY, HEAD_BYTES, board_bytes
from sparsecomm.ps.server.shard import Shard
from sparsecomm.transport.mailbox.window import Window

__all__ = ["Board"]


class Board:
    """Writes a shard to a window.

    Args:
        window: Window of the server, at least `board_bytes(numel)` long. Its memory is mutated.
        numel: Number of elements of the shard.
    """

    def __init__(self, window: Window, numel: int) -> None:
        self._window = window
        self._head = window.memory[:24].view(torch.int64)
        self._values = window.memory[HEAD_BYTES : board_bytes(numel)].view(torch.float32)
        self._head.fill_(0)
        self._shown = -1

    def show(self, shard: Shard) -> None:
        """Brings the window up to date; copies the values only if the version is new."""
        self._head[2] = min(shard.clocks.values(), default=EVERYBODY)
        if shard.ready and shard.version != self._shown:
            self._head[0] += 1
            self._window.sync()  # orders the writes: MPI promises no order without it
            self._values.copy_(shard.values)
            self._head[1] = self._shown = shard.version
            self._window.sync()
            self._head[0] += 1
        self._window.sync()
