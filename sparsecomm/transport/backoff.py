"""Pauses of a polling loop. MPI does not notify a thread that a message has arrived, so the thread has to poll."""

from __future__ import annotations

import time

__all__ = ["Backoff"]

# Seconds without news after which the loop pauses between two polls: another rank may need this core.
_SPIN = 20e-6
# Length of a pause as a fraction of the time without news. A larger one delays messages, a smaller one takes more time
# from computation.
_PAUSE = 1 / 4
_LONGEST = 500e-6  # seconds; the pieces of a long message move only while somebody polls


class Backoff:
    """Pauses that grow with the time since the last news, so that a long wait leaves the core to others."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self.news()

    def news(self) -> None:
        """Notes that a message has arrived or that work was done."""
        self._since = time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since the last news."""
        return time.monotonic() - self._since

    def pause(self) -> float:
        """Returns the seconds to pause before the next poll; 0 for no pause."""
        quiet = self.quiet
        return 0.0 if quiet < _SPIN else min(_LONGEST, quiet * _PAUSE)

    def sleep(self) -> None:
        """Pauses before the next poll. Does not call `time.sleep(0)`, because that takes about 60 us."""
        if pause := self.pause():
            time.sleep(pause)
