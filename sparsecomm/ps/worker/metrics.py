"""Counters of a worker."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WorkerMetrics"]


@dataclass
class WorkerMetrics:
    """Counters of a worker since it began.

    Attributes:
        pushes: Gradients pushed.
        pulls: Pulls done.
        nnz: Nonzeros pushed.
        bytes_sent: Bytes of all messages to servers, envelopes and headers included.
        bytes_received: Bytes of all messages from servers, envelopes and headers included.
        dense_bytes: Bytes that dense float32 pushes and pulls would have moved, without any headers.
        nonfinite: Pushes left out because the gradient was not finite.
        staleness: Sum over acknowledged pushes of the updates that their shard had seen since this worker's pull.
        acknowledged: Acknowledged pushes, counted by shard.
        stalest: Largest staleness of one push in updates.
        joined_at: Clock at which this worker began; 0 for workers that were there at the start.
        early_bytes: Payload bytes of pushes that left in backward.
        retracted: Early pushes that were sent again because their gradient had changed, counted by shard.
        torn: One-sided reads that met an update and were done again.
        fallbacks: One-sided pulls that asked the server after too many torn reads, counted by shard.
    """

    pushes: int = 0
    pulls: int = 0
    nnz: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    nonfinite: int = 0
    staleness: int = 0
    acknowledged: int = 0
    stalest: int = 0
    joined_at: int = 0
    early_bytes: int = 0
    retracted: int = 0
    torn: int = 0
    fallbacks: int = 0

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes on the wire, both ways; 1.0 if nothing has moved."""
        moved = self.bytes_sent + self.bytes_received
        return self.dense_bytes / moved if moved else 1.0

    @property
    def mean_staleness(self) -> float:
        """Mean number of updates between a pull and the application of the gradient computed on it."""
        return self.staleness / self.acknowledged if self.acknowledged else 0.0
