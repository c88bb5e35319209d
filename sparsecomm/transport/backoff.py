"""How long to wait between two looks at what may have come: MPI tells nobody when a message is there."""

from __future__ import annotations

import time

__all__ = ["Backoff"]

_SPIN = 20e-6  # seconds without news before there is a pause between looks: another rank may need this very core
_PAUSE = 1 / 4  # of the time without news: what looking may add to a wait, against what it takes from computing
_LONGEST = 500e-6  # seconds: the pieces of a long message move only when somebody looks


class Backoff:
    """Pauses that grow with the time since the last news, so that a long wait costs others little."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self.news()

    def news(self) -> None:
        """Notes that something has come or been done."""
        self._since = time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since the last news."""
        return time.monotonic() - self._since

    def pause(self) -> float:
        """Returns how long to pause before the next look, in seconds; 0 for not at all."""
        quiet = self.quiet
        return 0.0 if quiet < _SPIN else min(_LONGEST, quiet * _PAUSE)

    def sleep(self) -> None:
        """Pauses. A sleep of 0 would be none: the system makes it 60 us."""
        if pause := self.pause():
            time.sleep(pause)
