"""The candidates for a bucket, and the predicted seconds of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Scope, method_named, methods
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["NATIVE", "BucketSizes", "Candidate", "best_of_each", "candidates", "predict"]

BucketSizes = Mapping[int, tuple[int, int]]
"""Elements, and nonzeros to select, by bucket number."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An exchange method with a codec of values.

    Attributes:
        method: name of the exchange method.
        values: codec of the values.
    """

    method: str
    values: ValueCodec

    @property
    def is_dense(self) -> bool:
        """Whether nothing is compressed."""
        return not method_named(self.method).compresses

    @property
    def name(self) -> str:
        """Name in tables, e.g. "allgather" or "dense fp16"."""
        return f"{self.method} {self.values.name.lower()}" if self.method == "dense" else self.method


NATIVE = Candidate("native", ValueCodec.FP32)


def candidates(config: SparseConfig, *, layered: bool = False, native: bool = False) -> list[Candidate]:
    """Returns the candidates of "auto": sparse methods that work with any compressor, and dense methods.

    Dense methods in 16 bits are candidates only if feedback keeps their rounding and the value codec leaves it open.

    Args:
        config: options of the state.
        layered: whether several nodes have several ranks, which adds the method "two_level".
        native: whether the process group can sum the gradients, which adds the method "native".
    """
    scopes = (Scope.GENERAL, Scope.NODES) if layered else (Scope.GENERAL,)
    found = [Candidate(m.name, config.values) for m in methods().values() if m.scope in scopes and m.compresses]
    if native:
        found.append(NATIVE)
    dense = [config.dense_values]
    if config.feedback is not None and config.any_dense_values:
        dense = [ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16]
    return found + [Candidate("dense", values) for values in dense]


def predict(candidate: Candidate, sizes: Sizes, costs: Costs) -> Estimate:
    """Returns the predicted seconds of one bucket's exchange."""
    return method_named(candidate.method).seconds(sizes, costs)


def best_of_each(table: Mapping[int, Mapping[Candidate, Estimate]]) -> dict[int, Candidate]:
    """Returns the candidate with the fewest predicted seconds for every bucket; of equal ones the first."""
    return {index: min(row, key=lambda c: row[c].seconds) for index, row in table.items()}
