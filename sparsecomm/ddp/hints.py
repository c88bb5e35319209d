"""Hints on convergence, each said once on rank 0: an optimizer that does not fit, a run that ends in its warm-up."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from sparsecomm.ddp.fit import holds, misfit
from sparsecomm.ddp.model import WrappedModel
from sparsecomm.errors import ConvergenceWarning
from sparsecomm.exchange.config import SparseConfig

__all__ = ["Hints", "Run", "warmup_hint"]

_PATIENCE = 1000  # steps of other models' optimizers, until the search for ours is given up


@dataclass(slots=True)
class Run:
    """How far a state has come. It outlives the state, for the look at the end of the job.

    Attributes:
        config: options of the state.
        step: number of its next step.
    """

    config: SparseConfig
    step: int = 0


class Hints:
    """The hints of one state.

    A hook of torch that all optimizers call tells which of them steps our model. It is there from the first sparse
    bucket to the first bucket after a step of that optimizer.

    Args:
        config: options of the state.

    Attributes:
        run: how far the state has come. The state keeps it up to date.
        due: whether `at_bucket` has something to do.
    """

    def __init__(self, config: SparseConfig) -> None:
        self.run = Run(config)
        self.due = True
        self._ours: Collection[int] = ()  # ids of the model's parameters
        self._patience = 0
        self._looked = False  # whether the optimizer was found, or the search given up
        self._said: set[str] = set()
        self._handle: RemovableHandle | None = None

    def change(self, config: SparseConfig) -> None:
        """Takes over changed options, and looks again if the feedback is another one."""
        if config.feedback != self.run.config.feedback:
            self._looked, self.due = False, True
        self.run.config = config

    def at_bucket(self, model: WrappedModel, *, sparse: bool) -> None:
        """Starts to look for the optimizer at the first sparse bucket, and ends it once the optimizer was seen.

        Args:
            model: the model of the state.
            sparse: whether the bucket is exchanged sparsely, by a method that has been decided on.
        """
        if self._looked:
            # Not done by the hook itself, because torch iterates over all hooks while it calls them.
            if self._handle is not None:
                self._handle.remove()
            self._handle, self._ours, self.due = None, (), False
        elif model.rank != 0:
            self.due = False
        elif sparse:
            self.due = False
            self._ours, self._patience = model.names, _PATIENCE
            if self._handle is None:
                self._handle = _call_after_steps(self)
            if model.size > 1:
                _speak_at_exit(self.run)

    def look_at(self, optimizer: torch.optim.Optimizer) -> None:
        """Judges an optimizer that has just stepped if it steps our model. Called by torch's hook alone."""
        self._patience -= 1
        ours = holds(optimizer, self._ours)
        if ours or self._patience <= 0:
            self._looked = self.due = True
        text = misfit(optimizer, self.run.config.feedback, self._ours) if ours else None
        if text is not None and text not in self._said:
            self._said.add(text)
            # The fourth frame is the script's optimizer.step(), above the hook and torch's wrapper.
            warnings.warn(text, ConvergenceWarning, stacklevel=4)


def _call_after_steps(hints: Hints) -> RemovableHandle:
    """Registers `look_at` with all optimizers. If the state is dropped, the hook does nothing any more."""
    reference = weakref.ref(hints)

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found = None if torch.compiler.is_compiling() else reference()  # nothing of this is for a compiled graph
        if found is not None:
            found.look_at(optimizer)

    return register_optimizer_step_post_hook(after_step)


# --- at the end of the job ------------------------------------------------------------------------------------------

_latest: Run | None = None
_speaker: int | None = None
"""Id of the process that speaks at its exit; its forks do not."""


def warmup_hint(run: Run) -> str | None:
    """Returns a hint if a run that ends now was shorter than the warm-up of its density; else None."""
    density = getattr(run.config.compressor, "density", None)
    final_from: int = getattr(density, "final_from", 0)  # of an unknown schedule nothing can be said
    if run.step >= final_from:
        return None
    return (
        f"the run ended after {run.step} steps, but its density is final from step {final_from} on: it sent more than "
        "that density all the time. If it does not go on from a checkpoint, shorten the warm-up; half of the run's "
        "steps worked well (docs/convergence.md)"
    )


def _speak_at_exit(run: Run) -> None:
    """Looks at a run when the process exits, unless a later state takes its place."""
    global _latest, _speaker
    _latest = run
    if _speaker is None:
        _speaker = os.getpid()
        atexit.register(_at_exit)


def _at_exit() -> None:
    if _latest is not None and os.getpid() == _speaker:
        text = warmup_hint(_latest)
        if text is not None:
            warnings.warn(text, ConvergenceWarning, stacklevel=2)
