"""Signs that compression slows convergence: figures over all buckets of a state, their limits, and one warning."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomm.errors import ConvergenceWarning
from sparsecomm.feedback import Seen

__all__ = ["Convergence", "ConvergenceAlarm", "combine", "problems"]

# The limits are provisional: no run in which compression did harm has calibrated them yet. They scale with the density
# d, since an element waits about 1 / d steps whatever the model is. For elements sent at random, p90 of the ages is
# 2.3 / d, the share that was not sent once in 2 / d steps is 0.14, and for independent noise the residual is about
# sqrt(1 / d) gradients. A small multilayer perceptron that learned well (two ranks, top-k at 0.01 and 0.001) reached
# 4.5 / d, 0.31 and 1.2 sqrt(1 / d). In a CNN that learned as well as a dense one, p90 reached 13 / d: the weights of
# pixels that are nearly always dark wait long, and it does no harm.
MOST_RATIO = 10.0  # residual over gradient, times sqrt(1 / d)
MOST_AGE = 50.0  # p90 of the ages, times 1 / d
MOST_NEVER = 0.5  # share of elements
SETTLED = 2.0  # steps at one density before the figures count, times 1 / d
CHECK_EVERY = 128  # steps between two checks, or 1 / (4 d) if that is more
SUSTAINED = 3  # checks in a row that find the same problem before the state warns


@dataclass(frozen=True, slots=True)
class Convergence:
    """Signs of how compression affects convergence, over all buckets whose last exchange was compressed, on this rank.

    All are estimates from some elements of each bucket.

    Attributes:
        residual_ratio: 2-norm of the residual over that of the vector added to it in a step: the gradient, or the
            update of momentum or Adam correction.
        mean_age: mean number of steps that elements have waited to be sent, over those that wait. NaN if the method
            sends a part of every element in every step, or sends sums of several ranks.
        p90_age: 90th percentile of the same.
        never_sent: share of the elements that were not sent once in `steps`. NaN as for `mean_age`.
        steps: compressed steps that were watched; the fewest of all buckets. Counting starts anew after a dense
            exchange, a checkpoint, or a change of the bucket.
    """

    residual_ratio: float
    mean_age: float
    p90_age: float
    never_sent: float
    steps: int

    def __str__(self) -> str:
        """Returns the figures in one line."""
        line = f"the residual is {self.residual_ratio:.1f} times a step's gradient"
        if not math.isnan(self.mean_age):
            line += (
                f"; what waits has waited {self.mean_age:.0f} steps on average, a tenth of it {self.p90_age:.0f} or "
                f"more; {self.never_sent:.0%} was not sent once in {self.steps} steps"
            )
        return line


def combine(buckets: Sequence[Seen]) -> Convergence | None:
    """Returns the figures over all buckets, which count by their elements; None for no buckets."""
    if not buckets:
        return None
    residual = math.sqrt(sum(b.residual**2 for b in buckets))
    added = math.sqrt(sum(b.added**2 for b in buckets))
    mean = p90 = never = math.nan
    aged = [(b, b.ages) for b in buckets if b.ages is not None and b.ages.size]
    if aged:
        ages = np.concatenate([found for _, found in aged])
        weights = np.concatenate([np.full(found.size, b.numel / found.size) for b, found in aged])
        missed = np.concatenate([found >= b.steps for b, found in aged])
        never = float(weights[missed].sum() / weights.sum())
        mean, p90 = _mean_and_p90(ages[ages > 0], weights[ages > 0])
    ratio = residual / added if added else (math.inf if residual else 0.0)
    return Convergence(ratio, mean, p90, never, min(b.steps for b in buckets))


def _mean_and_p90(ages: npt.NDArray[Any], weights: npt.NDArray[Any]) -> tuple[float, float]:
    """Returns the weighted mean and 90th percentile; zeros if there are no ages."""
    if not ages.size:
        return 0.0, 0.0
    order = np.argsort(ages)
    below = np.cumsum(weights[order])
    p90 = ages[order][np.searchsorted(below, 0.9 * below[-1])]
    return float(np.average(ages, weights=weights)), float(p90)


def problems(found: Convergence, density: float) -> list[str]:
    """Returns the figures beyond their limits, in words; none before `SETTLED / density` steps."""
    if found.steps < SETTLED / density:
        return []
    texts = []
    if found.never_sent > MOST_NEVER:
        texts.append(f"{found.never_sent:.0%} of the elements were not sent once in {found.steps} steps")
    if found.p90_age > MOST_AGE / density:
        texts.append(f"a tenth of what waits has waited {found.p90_age:.0f} steps or more")
    if found.residual_ratio > MOST_RATIO / math.sqrt(density):
        texts.append(f"the residual is {found.residual_ratio:.0f} times a step's gradient")
    return texts


class ConvergenceAlarm:
    """Warns once, if figures stay beyond their limits while the density stays the same.

    Attributes:
        due: step at which `check` is to be called next; infinite after the warning.
    """

    def __init__(self) -> None:
        self.due: float = CHECK_EVERY
        self._density = math.nan
        self._since = 0  # step from which the density has been the same
        self._found = 0  # checks in a row

    def begin_again(self, step: int) -> None:
        """Forgets what was found, because the options or the step have changed."""
        if self.due != math.inf:
            self.due = step + CHECK_EVERY
        self._density = math.nan

    def check(self, step: int, density: float, measure: Callable[[], Convergence | None]) -> None:
        """Checks the figures, and warns if they were beyond their limits at the last checks too.

        Args:
            step: training step.
            density: fraction of elements to send in this step.
            measure: returns the figures; None if nothing is compressed.
        """
        self.due = step + max(CHECK_EVERY, round(0.25 / density))
        if density != self._density:  # a schedule is at work, or this is the first check
            self._density, self._since, self._found = density, step, 0
        found = measure() if density < 1.0 and step - self._since >= SETTLED / density else None
        texts = [] if found is None else problems(found, density)
        self._found = self._found + 1 if texts else 0
        if self._found == SUSTAINED:
            self.due = math.inf
            _warn(
                f"sparsecomm: compression may slow convergence: at step {step}, {' and '.join(texts)} (density "
                f"{density:g}). Compare with a dense run, or send more: state.update(density=...). "
                "docs/observing.md explains the figures of state.convergence()"
            )


def _warn(text: str) -> None:
    """Warns from the engine's thread, which an error would stop."""
    try:
        warnings.warn(text, ConvergenceWarning, stacklevel=2)
    except Warning:  # the user makes errors of warnings
        print(text, file=sys.stderr, flush=True)
