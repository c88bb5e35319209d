"""Counters of what was exchanged. No printing."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["BucketReport", "Metrics"]


@dataclass(slots=True)
class BucketReport:
    """What the exchange of one bucket cost this rank.

    Attributes:
        bucket: bucket number.
        step: training step.
        numel: elements of the bucket.
        nnz: nonzeros this rank sent (numel if it was exchanged densely).
        bytes_sent: bytes this rank sent, headers and sizes included.
        bytes_received: bytes this rank received.
        dense_bytes: bytes a ring allreduce of float32 would have sent from this rank.
        nonfinite: elements that were NaN or infinite on this rank.
        select_seconds: accumulate and select.
        encode_seconds: encode, rounding errors kept.
        wait_seconds: from the first message to the last.
        apply_seconds: decode, check, reduce into the bucket.
    """

    bucket: int
    step: int
    numel: int
    nnz: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    nonfinite: int = 0
    select_seconds: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    apply_seconds: float = 0.0


@dataclass(slots=True)
class Metrics:
    """Sums over all exchanges of a state on this rank; the attributes are those of `BucketReport`, summed.

    Attributes:
        steps: optimizer-visible steps exchanged (backward passes that communicated).
        buckets: exchanges.
    """

    steps: int = 0
    buckets: int = 0
    numel: int = 0
    nnz: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    nonfinite: int = 0
    select_seconds: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    apply_seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Compression ratio: dense bytes over bytes on the wire, headers included; 1.0 if nothing was sent."""
        return self.dense_bytes / self.bytes_sent if self.bytes_sent else 1.0

    @property
    def density(self) -> float:
        """Fraction of elements sent; 1.0 if nothing was exchanged."""
        return self.nnz / self.numel if self.numel else 1.0

    def add(self, report: BucketReport) -> None:
        """Adds one bucket's exchange. Mutates self."""
        self.buckets += 1
        for f in fields(report):
            if f.name not in ("bucket", "step"):
                setattr(self, f.name, getattr(self, f.name) + getattr(report, f.name))
