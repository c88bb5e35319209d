"""A frozen copy of the measurements, predictions and decision of a chooser."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecomm.exchange.costs import Costs, Estimate

__all__ = ["BucketRows", "CandidateRow", "ChooserReport", "Decision", "OptionRow"]


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One candidate for one bucket.

    Attributes:
        name: the candidate's name.
        predicted: seconds of one exchange.
        measured: median seconds of this rank's last exchanges; None before the first.
        chosen: whether the last decision uses this candidate for this bucket.
    """

    name: str
    predicted: Estimate
    measured: float | None
    chosen: bool


@dataclass(frozen=True, slots=True)
class BucketRows:
    """All candidates for one bucket.

    Attributes:
        index: bucket number.
        numel: elements of the bucket.
        candidates: the fastest prediction first.
    """

    index: int
    numel: int
    candidates: tuple[CandidateRow, ...]


@dataclass(frozen=True, slots=True)
class OptionRow:
    """One option of the trial.

    Attributes:
        name: the option's name.
        predicted: seconds of all exchanges of a step, one after the other.
        measured: median seconds of a whole step on the slowest rank; infinite before it was tried.
        is_plain: whether the option compresses nothing.
    """

    name: str
    predicted: float
    measured: float
    is_plain: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """The end of a trial.

    Attributes:
        step: training step of the decision.
        option: position of the chosen option in `ChooserReport.options`.
    """

    step: int
    option: int


@dataclass(frozen=True, slots=True)
class ChooserReport:
    """The state of a chooser at one moment, which `explain` turns into text.

    Attributes:
        ranks: number of ranks.
        costs: the measured costs; None before they are measured.
        buckets: in ascending order of bucket number.
        options: the options of the current trial, the fastest prediction first.
        decision: the outcome of the current trial; None while it runs.
    """

    ranks: int
    costs: Costs | None
    buckets: tuple[BucketRows, ...]
    options: tuple[OptionRow, ...]
    decision: Decision | None
