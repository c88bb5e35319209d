"""A warning at the end for a script that makes a state but never registers the hook: it trains densely, silently."""

from __future__ import annotations

import sys

from sparsecomm.launch import World, call_at_end

__all__ = ["note_use", "watch_use"]

_used = False
_watched = False


def watch_use() -> None:
    """Makes rank 0 print a warning when the world ends, if no state of this process was ever used."""
    global _watched
    if not _watched:
        _watched = True
        call_at_end(_look)


def note_use() -> None:
    """Notes that a gradient was handed over for averaging."""
    global _used
    _used = True


def _look(world: World) -> None:
    if not _used and world.rank == 0 and world.size > 1:
        print(
            "sparsecomm: a SparseState was made, but no gradient was exchanged through it. Was the hook registered? "
            "ddp.register_comm_hook(state, sparsecomm.sparse_hook)",
            file=sys.stderr,
        )
