"""The chooser of `collective="auto"`: predicts, tries the best options on real steps, and decides for all ranks.

    1 watch    use the rule of thumb (fewest bytes) in the first two steps, and note the sizes of the buckets
    2 measure  measure messages and kernels on all ranks together, and keep the figures of the slowest rank
    3 predict  predict the seconds of every candidate for every bucket, from the same figures on all ranks
    4 try      use each option whose prediction is near the best for a few steps per turn, and time whole steps, since
               the backward pass hides part of an exchange
    5 decide   compare the medians of the slowest rank, the same on all ranks; drop the options that are clearly slower
               and try the others again, until one is left or the difference is not worth more steps
    6 again    start from 3 when the number of nonzeros has halved or doubled, e.g. in a warm-up of the density

All ranks follow the same schedule by counting steps. They exchange figures only in 2 and 5.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch

from sparsecomm.collectives import agreed_maximum
from sparsecomm.exchange.auto.explain import explain
from sparsecomm.exchange.auto.measure import agree_to_choose, measure
from sparsecomm.exchange.auto.predict import BucketSizes, Candidate, best_of_each, candidates, predict
from sparsecomm.exchange.auto.report import BucketRows, CandidateRow, ChooserReport, Decision, OptionRow
from sparsecomm.exchange.auto.rule import choose_collective
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import method_named
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["Chooser", "Option"]

WATCHED = 2
"""Steps before anything is measured, since DDP rebuilds its buckets after the first."""
TURN = 5
"""Steps of a turn. The first one is not timed, since it grows buffers and makes regions."""
TURNS = 2
"""Turns of each option in a round, so that a temporary slowdown of the machine does not hit one option alone."""
ROUNDS = 4
"""Most rounds of a trial. Medians of 32 steps tell apart options that differ by a few percent on a shared machine."""
REACH = 1.6
"""Options predicted to take at most this many times the best prediction are tried, given the error of predictions."""
PLAIN_REACH = 4.0
"""The same for no compression, which the choice must never be slower than. Its prediction is the least accurate, since
computation takes the smallest part of its time."""
MOST_OPTIONS = 4
"""Most options in a trial."""
_MARGIN = 0.98  # an option counts as faster than another only below this fraction of its seconds
_CLEARLY = (1.25, 1.12, 1.06)  # times the fastest, after rounds 1, 2 and 3: slower options are dropped

Call = Callable[[str, Callable[[Channel], CollectiveSteps[Any]]], Any]
"""Runs a collective and waits for its result. Takes a label and a function that makes the generator."""


@dataclass(slots=True)
class Option:
    """An assignment of candidates to all buckets.

    Attributes:
        name: name of the candidate, or "the best of each bucket".
        by_bucket: candidates by bucket number.
        default: candidate for any other bucket.
        predicted: seconds of all exchanges of a step, one after the other.
        samples: seconds of whole steps on this rank.
        measured: median seconds of a step on the slowest rank; infinite before it was tried.
    """

    name: str
    by_bucket: Mapping[int, Candidate]
    default: Candidate
    predicted: float
    samples: list[float] = field(default_factory=list)
    measured: float = math.inf

    @property
    def is_plain(self) -> bool:
        """Whether all buckets are exchanged densely in float32, without anything left in a residual."""
        return all(c.is_dense and c.values == ValueCodec.FP32 for c in self.by_bucket.values())

    def of(self, index: int) -> Candidate:
        """Returns the candidate for a bucket."""
        return self.by_bucket.get(index, self.default)


class Chooser:
    """Chooses the exchange method of every bucket for one state.

    Args:
        config: options of the state.
        size: number of ranks.
        native: whether the process group can sum the gradients.

    Attributes:
        config: options of the state.
        size: number of ranks.
        costs: measured costs; None before they are measured.
        table: predictions by bucket number and candidate.
        options: options of the last trial, the fastest prediction first.
        chosen: the option of the last decision; None before the first.
        decided_at: training step of the decision of the last trial; None while it runs.
        measured: seconds of the last exchanges on this rank, by bucket number and candidate.
    """

    def __init__(self, config: SparseConfig, size: int, *, native: bool = False) -> None:
        self.config = config
        self.size = size
        self._native = native
        self.costs: Costs | None = None
        self.table: dict[int, dict[Candidate, Estimate]] = {}
        self.options: list[Option] = []
        self.chosen: Option | None = None
        self.decided_at: int | None = None
        self.measured: defaultdict[tuple[int, Candidate], deque[float]] = defaultdict(lambda: deque(maxlen=16))
        self._arena = Arena()
        self._step = -1
        self._watched = 0
        self._round = 0  # of the trial
        self._position = 0  # steps of the round so far
        self._schedule: list[Option] = []
        self._current: Option | None = None
        self._sizes: dict[int, tuple[int, int]] = {}
        self._last_sizes: BucketSizes = {}
        self._predicted_sizes: BucketSizes = {}
        self._handed_over: tuple[Option, float] | None = None

    def begin(self, step: int, call: Call) -> None:
        """Starts a step, unless it has begun already. Collective in the steps in which ranks exchange figures.

        Args:
            step: training step.
            call: runs a collective of the state's ranks.

        Raises:
            SparseCommError: raised on every rank if the exchange of figures fails.
        """
        if step == self._step:
            return
        self._step = step
        if self._sizes:
            self._last_sizes, self._sizes = self._sizes, {}
            self._watched += 1
        if self._schedule:
            self._position += 1
            if self._position >= len(self._schedule):
                self._decide(step, call)
        elif self._watched >= WATCHED and (self.chosen is None or self._k_moved()):
            self._open_trial(step, call)
        self._current = self._schedule[self._position] if self._schedule else self.chosen

    def choose(self, index: int, numel: int, k: int) -> Candidate:
        """Returns the candidate for a bucket in this step."""
        self._sizes[index] = (numel, k)
        if self._current is not None:
            return self._current.of(index)
        return self._rule_of_thumb(numel, k)

    def handed_over(self) -> None:
        """Records that DDP handed over the last bucket of the step. The time between two calls is that of a step."""
        now, current = perf_counter(), self._current
        before, self._handed_over = self._handed_over, None
        if current is None:
            return
        self._handed_over = (current, now)
        if self._schedule and self._position % TURN and before is not None and before[0] is current:
            current.samples.append(now - before[1])

    def finished(self, index: int, candidate: Candidate, seconds: float) -> None:
        """Records the seconds of a bucket's exchange on this rank. Called on the engine's thread."""
        self.measured[index, candidate].append(seconds)

    def explain(self) -> str:
        """Returns tables of predicted and measured seconds, by bucket and by option, and the reason of the decision."""
        return explain(self.report())

    def report(self) -> ChooserReport:
        """Returns a frozen copy of the measurements, predictions and decision."""
        options = tuple(OptionRow(o.name, o.predicted, o.measured, o.is_plain) for o in self.options)
        decision = None
        if self.decided_at is not None and self.chosen is not None:
            decision = Decision(self.decided_at, next(i for i, o in enumerate(self.options) if o is self.chosen))
        buckets = tuple(self._rows(index) for index in sorted(self.table))
        return ChooserReport(self.size, self.costs, buckets, options, decision)

    def _rows(self, index: int) -> BucketRows:
        rows = []
        for candidate, estimate in sorted(self.table[index].items(), key=lambda item: item[1].seconds):
            samples = list(self.measured.get((index, candidate), ()))
            chosen = self.chosen is not None and self.chosen.of(index) == candidate
            rows.append(CandidateRow(candidate.name, estimate, median(samples) if samples else None, chosen))
        return BucketRows(index, self._predicted_sizes[index][0], tuple(rows))

    def _sizes_of(self, numel: int, k: int, values: ValueCodec) -> Sizes:
        return Sizes(k, numel, self.size, values, self.config.indices)

    def _rule_of_thumb(self, numel: int, k: int) -> Candidate:
        config = self.config
        method = choose_collective(self._sizes_of(numel, k, config.values), dense_codec=config.dense_values)
        return Candidate(method, config.values if method_named(method).compresses else config.dense_values)

    def _k_moved(self) -> bool:
        then, now = (sum(k for _, k in sizes.values()) for sizes in (self._predicted_sizes, self._last_sizes))
        return not then / 2 < now < then * 2

    def _open_trial(self, step: int, call: Call) -> None:
        config, sizes = self.config, self._last_sizes
        numel, k = (sum(pair[i] for pair in sizes.values()) for i in (0, 1))
        if self.costs is None:
            self.costs = call(
                f"the measurements of step {step}",
                lambda channel: measure(channel, step, config.compressor, k / max(numel, 1), self._arena),
            )
        costs = self.costs
        assert costs is not None, "measured above"
        self.table = {
            index: {c: predict(c, self._sizes_of(n, k, c.values), costs) for c in self._candidates()}
            for index, (n, k) in sizes.items()
        }
        self._predicted_sizes = sizes
        self.measured.clear()
        self.options = self._make_options()
        self.decided_at = None
        self._round = 0
        self._handed_over = None
        if len(self.options) == 1:
            self.chosen, self.decided_at = self.options[0], step
        else:
            self._open_round(self.options)

    def _open_round(self, options: Sequence[Option]) -> None:
        self._position = 0
        self._schedule = [option for _ in range(TURNS) for option in options for _ in range(TURN)]

    def _candidates(self) -> list[Candidate]:
        layered = self.costs is not None and self.costs.layered
        return candidates(self.config, layered=layered, native=self._native)

    def _make_options(self) -> list[Option]:
        """Returns the options that are worth a trial, the fastest prediction first."""
        table = self.table
        each = best_of_each(table)
        options: list[Option] = []
        for candidate in self._candidates():
            same = dict.fromkeys(table, candidate)
            total = self._total(same)
            if all(o.predicted != total for o in options):  # equal predictions mean equal exchanges: try one
                options.append(Option(candidate.name, same, candidate, total))
        if len(set(each.values())) > 1:
            largest = max(self._last_sizes, key=lambda i: self._last_sizes[i][0])
            options.append(Option("the best of each bucket", each, each[largest], self._total(each)))
        options.sort(key=lambda o: o.predicted)
        most = REACH * options[0].predicted
        tried = [o for o in options if o.predicted <= most][:MOST_OPTIONS]
        plain = [o for o in options if o.is_plain and o.predicted <= PLAIN_REACH * options[0].predicted]
        others = [o for o in tried if o not in plain][: MOST_OPTIONS - len(plain)]
        return [o for o in options if o in plain or o in others]

    def _total(self, by_bucket: Mapping[int, Candidate]) -> float:
        return sum(self.table[index][candidate].seconds for index, candidate in by_bucket.items())

    def _decide(self, step: int, call: Call) -> None:
        options, arena = self.options, self._arena
        mine = torch.tensor([median(o.samples) if o.samples else 0.0 for o in options], dtype=torch.float64)

        def gather(channel: Channel) -> CollectiveSteps[list[float]]:
            yield from agree_to_choose(channel, step, arena)
            return (yield from agreed_maximum(channel, mine, arena))

        figures: list[float] = call(f"round {self._round} of the decision of step {step}", gather)
        for option, seconds in zip(options, figures, strict=True):
            option.measured = seconds
        self._round += 1
        tried = [o for o in options if o in self._schedule]  # times of earlier rounds are not comparable
        fastest = min(tried, key=lambda o: o.measured)
        if self._round < ROUNDS:
            near = [o for o in tried if o.measured <= _CLEARLY[self._round - 1] * fastest.measured]
            if len(near) > 1:
                self._open_round(near)
                return
        # Of options that are about as fast as the fastest: no compression, since it leaves no residual; else the
        # fastest prediction.
        level = [o for o in tried if fastest.measured >= _MARGIN * o.measured]
        plain = sorted((o for o in level if o.is_plain), key=lambda o: o.measured)
        self.chosen, self.decided_at, self._schedule = (*plain, *level)[0], step, []
