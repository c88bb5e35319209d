"""Every error sparsecomm raises on purpose, one hierarchy, each carrying the offending value."""

from __future__ import annotations

__all__ = [
    "CollectiveMismatch",
    "CommTimeout",
    "ConfigError",
    "KernelError",
    "LabError",
    "LaunchError",
    "RemoteError",
    "SparseCommError",
    "StateError",
    "TransportError",
    "WireError",
]


class SparseCommError(RuntimeError):
    """Base of all errors raised by sparsecomm."""


class ConfigError(SparseCommError, ValueError):
    """An option, argument or gradient is not acceptable; the message names it and its value."""


class KernelError(SparseCommError):
    """A compute kernel was given tensors it cannot work on (our own bug unless you call kernels yourself)."""


class WireError(SparseCommError):
    """A payload is malformed: truncated, corrupted, hostile, or of another version.

    Args:
        field: name of the field that failed its check.
        value: what the field held.
        reason: why that is not acceptable.
        rank: the sender, where known.
        bucket: the bucket, where known.
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
        where = "" if rank is None else f" from rank {rank}"
        where += "" if bucket is None else f" for bucket {bucket}"
        super().__init__(f"bad payload{where}: {field} = {value!r}: {reason}")

    def at(self, *, rank: int | None = None, bucket: int | None = None) -> WireError:
        """Returns the same error with the sender and bucket filled in where they were unknown."""
        return WireError(
            self.field,
            self.value,
            self.reason,
            rank=self.rank if rank is None else rank,
            bucket=self.bucket if bucket is None else bucket,
        )


class CollectiveMismatch(SparseCommError):
    """Ranks entered different collectives: another bucket, step, layout or world size."""


class RemoteError(SparseCommError):
    """Another rank failed in this collective; the message names that rank and carries its cause."""


class CommTimeout(SparseCommError, TimeoutError):
    """A collective did not finish within the timeout (seconds); the message says whom it waited for."""


class TransportError(SparseCommError):
    """The transport failed, was shut down, or is used from a forked child."""


class LaunchError(SparseCommError):
    """The processes were not launched in a way that lets them find each other; the message has the fix."""


class StateError(SparseCommError, ValueError):
    """A checkpoint does not belong to this model or is damaged; nothing was applied."""


class LabError(SparseCommError):
    """A lab of network namespaces cannot be made, found, used or removed; the message says why and what helps."""
