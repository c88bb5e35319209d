"""Candidates for a bucket, and the seconds that each is predicted to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Scope, method_named, methods
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["BucketSizes", "Candidate", "best_of_each", "candidates", "predict"]

BucketSizes = Mapping[int, tuple[int, int]]
"""By bucket number: elements, and nonzeros to select."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to exchange a bucket.

    Attributes:
        method: name of the exchange method.
        values: codec of the values.
    """

    method: str
    values: ValueCodec

    @property
    def is_dense(self) -> bool:
        """Whether nothing is compressed."""
        return self.method == "dense"

    @property
    def name(self) -> str:
        """E.g. "allgather" or "dense fp16"."""
        return f"{self.method} {self.values.name.lower()}" if self.is_dense else self.method


def candidates(config: SparseConfig, *, layered: bool = False) -> list[Candidate]:
    """Returns the candidates of "auto": methods that exchange any compressor's selection, and no compression.

    Dense in 16 bits competes where its rounding is kept (with feedback) and the value codec allows it.

    Args:
        config: of the state.
        layered: whether several nodes have several ranks: two levels compete only there.
    """
    scopes = (Scope.GENERAL, Scope.NODES) if layered else (Scope.GENERAL,)
    found = [Candidate(m.name, config.values) for m in methods().values() if m.scope in scopes and m.name != "dense"]
    dense = [config.dense_values]
    if config.feedback is not None and config.value_codec == "auto":
        dense = [ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16]
    return found + [Candidate("dense", values) for values in dense]


def predict(candidate: Candidate, sizes: Sizes, costs: Costs) -> Estimate:
    """Returns the predicted seconds of one bucket's exchange."""
    return method_named(candidate.method).seconds(sizes, costs)


def best_of_each(
    table: Mapping[int, Mapping[Candidate, Estimate]],
) -> dict[int, Candidate]:
    """Returns for every bucket the candidate with the shortest predicted time; in a tie the first."""
    return {index: min(row, key=lambda c: row[c].seconds) for index, row in table.items()}
