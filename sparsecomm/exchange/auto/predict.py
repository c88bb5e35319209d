"""What can be chosen for a bucket, and what it is predicted to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import strategies, strategy_of
from sparsecomm.types import ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["Candidate", "Sizes", "best_of_each", "candidates", "predict"]

Sizes = Mapping[int, tuple[int, int]]
"""By bucket number: elements, and nonzeros to select."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to exchange a bucket.

    Attributes:
        kind: the collective.
        values: how values travel.
    """

    kind: CollectiveKind
    values: ValueCodec

    @property
    def name(self) -> str:
        """E.g. "allgather" or "dense fp16"."""
        name = strategy_of(self.kind).name
        return f"{name} {self.values.name.lower()}" if self.kind == CollectiveKind.DENSE else name


def candidates(config: SparseConfig, *, layered: bool = False) -> list[Candidate]:
    """Returns what "auto" chooses from: collectives that exchange what any compressor selects, and no compression.

    Dense in 16 bits competes where its rounding is kept (with feedback) and the value codec allows it.

    Args:
        config: of the state.
        layered: whether several nodes have several ranks: two levels compete only there.
    """
    sparse = [s for s in strategies().values() if s.competes and not s.special and layered >= s.layered]
    found = [Candidate(s.kind, config.values) for s in sparse if s.kind != CollectiveKind.DENSE]
    dense = [config.dense_values]
    if config.feedback is not None and config.value_codec == "auto":
        dense = [ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16]
    return found + [Candidate(CollectiveKind.DENSE, values) for values in dense]


def predict(candidate: Candidate, config: SparseConfig, costs: Costs, numel: int, k: int, size: int) -> Estimate:
    """Returns the expected seconds of one bucket's exchange."""
    return strategy_of(candidate.kind).estimate(costs, k, numel, size, candidate.values, config.indices)


def best_of_each(
    table: Mapping[int, Mapping[Candidate, Estimate]],
) -> dict[int, Candidate]:
    """Returns for every bucket what is predicted to take the least time; in a tie the first."""
    return {index: min(row, key=lambda c: row[c].seconds) for index, row in table.items()}
