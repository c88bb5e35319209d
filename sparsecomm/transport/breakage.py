"""What no longer communicates after a failure that the ranks have not agreed on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from sparsecomm.errors import SparseCommError, TransportError
from sparsecomm.transport.base import Request, is_over

__all__ = ["EVERYTHING", "Breakage"]

EVERYTHING = 0
"""The domain whose failure ends all others."""


class Breakage:
    """The domains of tasks that have failed. The engine's thread alone changes it.

    The ranks of a domain no longer agree on what is in flight, so none of its tasks may communicate again.

    Attributes:
        latest: the error that has broken a domain last; None if none is broken.
    """

    def __init__(self) -> None:
        self._causes: dict[int, BaseException] = {}
        self._abandoned: list[Request] = []
        self.latest: BaseException | None = None

    def add(self, domain: int, error: BaseException) -> None:
        """Notes that a domain has failed."""
        self._causes[domain] = self.latest = error

    def cause(self, domain: int) -> BaseException | None:
        """Returns why tasks of a domain can no longer communicate; None if they can."""
        return self._causes.get(EVERYTHING) or self._causes.get(domain)

    def refusal(self, label: str, domain: int) -> SparseCommError:
        """Returns the error of a task that is not exchanged, because its domain has failed before."""
        cause = self.cause(domain)
        error = TransportError(f"{label}: not exchanged, communication failed before: {cause}")
        error.__cause__ = cause
        return error

    def abandon(self, requests: Iterable[Request], *, blocking: bool) -> None:
        """Cancels requests and keeps their buffers alive while MPI may still read or write them.

        Args:
            requests: The requests of a task.
            blocking: Whether `Request.test` waits.
        """
        for request in requests:
            with contextlib.suppress(Exception):
                request.cancel()
            self._abandoned.append(request)
        if not blocking:
            self._abandoned = [request for request in self._abandoned if not is_over(request)]
