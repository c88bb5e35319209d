"""All errors that sparsecomm raises on purpose. They form one hierarchy, and each names the offending value.

There is one warning of its own, too, so that users can filter it.
"""

from __future__ import annotations

__all__ = [
    "CollectiveMismatch",
    "CommTimeout",
    "ConfigError",
    "ConvergenceWarning",
    "KernelError",
    "LabError",
    "LaunchError",
    "RankLeft",
    "RemoteError",
    "SparseCommError",
    "StateError",
    "TransportError",
    "WireError",
]


class SparseCommError(RuntimeError):
    """Base of all errors raised by sparsecomm."""


class ConfigError(SparseCommError, ValueError):
    """An option, argument or gradient is not acceptable. The message names it and its value."""


class KernelError(SparseCommError):
    """A compute kernel got tensors that it cannot process. A bug in sparsecomm, unless you call kernels yourself."""


class WireError(SparseCommError):
    """A payload is malformed: truncated, corrupted, hostile, or of another version.

    Args:
        field: Name of the field that failed its check.
        value: Value of the field.
        reason: Why the value is not acceptable.
        rank: Sender of the payload, if known.
        bucket: Bucket of the payload, if known.
    """

    def __init__(
        self,
        field: str,
        value: object,
        reason: str,
        *,
        rank: int | None = None,
        bucket: int | None = None,
    ) -> None:
        self.field = field
        self.value = value
        self.reason = reason
        self.rank = rank
        self.bucket = bucket
        origin = "" if rank is None else f" from rank {rank}"
        origin += "" if bucket is None else f" for bucket {bucket}"
        super().__init__(f"bad payload{origin}: {field} = {value!r}: {reason}")

    def at(self, *, rank: int | None = None, bucket: int | None = None) -> WireError:
        """Returns a copy of the error with another sender or bucket. None keeps the one that this error has."""
        return WireError(
            self.field,
            self.value,
            self.reason,
            rank=self.rank if rank is None else rank,
            bucket=self.bucket if bucket is None else bucket,
        )


class CollectiveMismatch(SparseCommError):
    """Ranks entered different collectives: their buckets, steps, layouts or world sizes differ."""


class RemoteError(SparseCommError):
    """Another rank failed in this collective. The message names that rank and the cause."""


class CommTimeout(SparseCommError, TimeoutError):
    """A collective did not finish within the timeout. The message names the ranks that it waited for."""


class TransportError(SparseCommError):
    """The transport failed, was shut down, or was used in a forked child."""


class RankLeft(TransportError):
    """A rank that a collective needs has left the job. The message says how: by which status, exception or death.

    Args:
        message: The message.
        rank: World rank that has left.
        failed: Whether it has failed, and did not just end.
    """

    def __init__(self, message: str, *, rank: int, failed: bool) -> None:
        self.rank = rank
        self.failed = failed
        super().__init__(message)


class LaunchError(SparseCommError):
    """The launcher did not start the processes so that they can find each other. The message says how to fix that."""


class StateError(SparseCommError, ValueError):
    """A checkpoint belongs to another model or is damaged. Nothing of it was applied."""


class LabError(SparseCommError):
    """A lab of network namespaces cannot be made, found, used or removed. The message says why and how to fix it."""


class ConvergenceWarning(UserWarning):
    """Training runs, but its loss is likely to suffer: options, optimizer and run do not fit. A hint, no refusal."""
