"""A script that makes a state and forgets the hook trains densely without a word: this says so at its end."""

from __future__ import annotations

import atexit
import os
import sys

from sparsecomm.launch import is_initialized, world

__all__ = ["note_use", "watch_use"]

_used = False
_watched: int | None = None
"""The process that will look at its end; a fork of it will not."""


def watch_use() -> None:
    """Sees to it that rank 0 is told at its end if no state of this process was ever used."""
    global _watched
    if _watched is None:
        _watched = os.getpid()
        # Registered after the shutdown that init registers, hence called before it.
        atexit.register(_look)


def note_use() -> None:
    """Notes that a gradient was handed over."""
    global _used
    _used = True


def _look() -> None:
    if _used or os.getpid() != _watched or not is_initialized():
        return
    here = world()
    if here.rank == 0 and here.size > 1:
        print(
            "sparsecomm: a SparseState was made, but no gradient was exchanged through it. Was the hook registered? "
            "ddp.register_comm_hook(state, sparsecomm.sparse_hook)",
            file=sys.stderr,
        )
