"""A warning at exit for a script that makes a state but never registers the hook: it trains densely, silently."""

from __future__ import annotations

import atexit
import os
import sys

from sparsecomm.launch import is_initialized, world

__all__ = ["note_use", "watch_use"]

_used = False
_watched: int | None = None
"""Id of the process that checks at its exit; its forks do not."""


def watch_use() -> None:
    """Makes rank 0 print a warning at its exit if no state of this process was ever used."""
    global _watched
    if _watched is None:
        _watched = os.getpid()
        # atexit calls the latest registration first: this one runs before the shutdown that init registered.
        atexit.register(_look)


def note_use() -> None:
    """Notes that a gradient was handed over for averaging."""
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
