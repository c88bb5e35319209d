"""Layout of the window in which a server shows its shard.

| offset | bytes | content |
|---|---|---|
| 0 | 8 | int64: a count that is odd while the values change |
| 8 | 8 | int64: the version of the values |
| 16 | 8 | int64: the clock of the slowest worker, `EVERYBODY` when all workers have left |
| 24 | 40 | unused |
| 64 | 4 numel | float32: the values |

It is a seqlock: a reader may use the values if the count was even and the same before and after it read them. In MPI a
read during an update is undefined, so its values are thrown away. The server's writes are ordered by MPI_Win_sync,
which needs windows of the unified memory model. In a test with Open MPI's osc sm, three workers that read 8 MB as fast
as they could met some 20 updates in 120 reads and used none of those values.
"""

from __future__ import annotations

__all__ = ["EVERYBODY", "HEAD_BYTES", "board_bytes"]

HEAD_BYTES = 64  # a cache line, so that the values are aligned

EVERYBODY = 1 << 62
"""Clock of the slowest worker when no worker is left."""


def board_bytes(numel: int) -> int:
    """Returns the bytes of window that a shard of `numel` elements needs."""
    return HEAD_BYTES + 4 * numel
