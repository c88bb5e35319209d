"""The events of a job, in words."""

from __future__ import annotations

__all__ = ["Events"]

_MOST = 1000
_MOST_REFUSALS = 100
_LONGEST = 1000  # characters


class Events(list[str]):
    """The newest events of a job, as one server saw them: deaths, take-overs, refused messages.

    Their number, and the length of each, is bounded: whoever makes events must not fill the server's memory or log.

    Attributes:
        total: Number of events so far, those included that are not in the list any more.
        refused: Number of messages refused, by sender.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.refused: dict[int, int] = {}

    def append(self, text: str, /) -> None:
        """Adds an event, cut to `_LONGEST` characters and without control characters."""
        cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        super().append("".join(c if c.isprintable() or c == "\n" else "?" for c in cut))
        self.total += 1
        if len(self) > _MOST:
            del self[0]

    def refuse(self, sender: int, why: str) -> None:
        """Counts a refused message. The first `_MOST_REFUSALS` are events, so that they cannot displace all others."""
        before = sum(self.refused.values())
        self.refused[sender] = self.refused.get(sender, 0) + 1
        if before < _MOST_REFUSALS:
            self.append(f"refused a message of rank {sender}: {why}")
        elif before == _MOST_REFUSALS:
            self.append(f"refused {before} messages so far; further ones are counted and not listed")

    def since(self, total: int) -> list[str]:
        """Returns the events that came after the first `total` ones, as far as they are still in the list."""
        return self[max(0, len(self) - (self.total - total)) :]
