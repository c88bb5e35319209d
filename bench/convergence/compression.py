"""Makes the ``SparseState`` that the command line asks for: compressor, density schedule and feedback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from options import ADAM_BETA2, TORCH_HOOKS, Settings

import sparsecomm as sc

MAKERS: dict[str, Callable[[Any], sc.Compressor]] = {
    "topk": sc.TopK,
    "threshold": sc.ThresholdTopK,
    "chunk": partial(sc.ChunkTopK, chunk=256),  # these models are small: a layer is some thousands of elements
    "random": sc.RandomK,
    "cyclic": sc.CyclicTopK,
}


def make_density(settings: Settings) -> float | Callable[[int], float]:
    """Returns the density: a number, or a schedule over the steps."""
    if not settings.warmup_steps:
        return settings.density
    if settings.warmup_kind == "exp":
        return sc.Geometric(settings.warmup_densities[0], settings.density, settings.warmup_steps)
    stage = settings.warmup_steps // len(settings.warmup_densities)
    return sc.Warmup(settings.warmup_densities, steps_per_stage=stage, final=settings.density)


def make_feedback(settings: Settings) -> sc.ErrorFeedback | sc.MomentumCorrection | sc.AdamCorrection | None:
    """Returns the feedback, which keeps the gradients that are not sent; None drops them."""
    if settings.feedback == "none":
        return None
    if settings.feedback == "dgc":  # clips before momentum, as the whole gradient is not known after it
        return sc.MomentumCorrection(momentum=settings.averaging, nesterov=settings.nesterov, clip_norm=settings.clip)
    if settings.feedback == "adam":
        return sc.AdamCorrection(beta1=settings.averaging, beta2=ADAM_BETA2, clip_norm=settings.clip)
    return sc.ErrorFeedback()


def make_state(settings: Settings) -> sc.SparseState | None:
    """Returns the state that the command line asks for; None for plain DDP and torch's hooks."""
    if settings.compressor in ("none", *TORCH_HOOKS):
        return None
    compressor: sc.Compressor = sc.Dense()
    if settings.sparse:
        compressor = MAKERS[settings.compressor](make_density(settings))
    return sc.SparseState(
        compressor,
        feedback=make_feedback(settings),
        value_codec=settings.value_codec,
        index_codec=settings.index_codec,
        collective=settings.collective,
    )
