"""Which optimizers do not fit a feedback, judged by what they keep between steps. docs/convergence.md has the table."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from sparsecomm.feedback import AdamCorrection, Feedback, MomentumCorrection

__all__ = ["INSTEAD_OF_ADAM", "INSTEAD_OF_MOMENTUM", "holds", "misfit"]

INSTEAD_OF_ADAM = "sparsecomm.optim.AdamW(parameters, state, lr=...), which takes dense's settings"
"""Recommended in place of an adaptive optimizer after sparse averages of gradients."""
INSTEAD_OF_MOMENTUM = "torch.optim.SGD(lr, weight_decay=...) without momentum, or the optimizers of sparsecomm.optim"
"""Recommended after a feedback that has already applied the moments."""

# Names in an optimizer's state. They also tell of optimizers that torch does not have, and of SGD's momentum.
_MOMENTUM = {"momentum_buffer", "exp_avg", "state1"}
_SECOND_MOMENT = {
    "exp_avg_sq",  # Adam, AdamW, NAdam, RAdam, SparseAdam; FusedAdam and LAMB of other packages
    "exp_inf",  # Adamax
    "square_avg",  # RMSprop, Adadelta
    "sum",  # Adagrad
    "row_var",  # Adafactor
    "variance",  # Adafactor, of vectors
    "exp_avg_sq_row",  # Adafactor of transformers
    "state2",  # Adam of bitsandbytes
}


def holds(optimizer: torch.optim.Optimizer, ours: Collection[int]) -> bool:
    """Returns whether an optimizer steps one of the parameters with these ids."""
    return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])


def misfit(optimizer: torch.optim.Optimizer, feedback: Feedback | None, ours: Collection[int]) -> str | None:
    """Returns a hint to an optimizer that does not fit the feedback; None if nothing speaks against it.

    An optimizer that is made for sparse averages says so by an attribute ``fits_sparse_averages = True``.

    Args:
        optimizer: an optimizer that has stepped, so that it has its state.
        feedback: feedback before it, in exchanges that are sparse.
        ours: ids of the parameters whose gradients are exchanged.
    """
    if getattr(optimizer, "fits_sparse_averages", False):
        return None
    kept, name = _kept(optimizer, ours), type(optimizer).__name__
    adaptive = not kept.isdisjoint(_SECOND_MOMENT)
    if isinstance(feedback, (AdamCorrection, MomentumCorrection)):
        if not adaptive and kept.isdisjoint(_MOMENTUM):
            return None
        applied = "Adam" if isinstance(feedback, AdamCorrection) else "momentum"
        return (
            f"{name} keeps {'moments' if adaptive else 'momentum'} of its own after {type(feedback).__name__}, which "
            f"has applied {applied} already. Use {INSTEAD_OF_MOMENTUM} (docs/convergence.md)"
        )
    if not adaptive:
        return None
    return (
        f"{name} divides by a second moment, which sees each coordinate of sparse averages as rare, large spikes: "
        f"AdamW was seen to end up to 29% above the loss of a dense run. Use {INSTEAD_OF_ADAM} (docs/convergence.md)"
    )


def _kept(optimizer: torch.optim.Optimizer, ours: Collection[int]) -> set[object]:
    """Returns the names of all that an optimizer keeps for our parameters."""
    mine = (p for group in optimizer.param_groups for p in group["params"] if id(p) in ours)
    entries = (optimizer.state.get(p) for p in mine)
    return {key for e in entries if isinstance(e, Mapping) for key, value in e.items() if value is not None}
