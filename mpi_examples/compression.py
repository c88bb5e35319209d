"""From the command line to a ``SparseState``: what is sent of the gradients, and what becomes of the rest."""

from __future__ import annotations

from collections.abc import Callable

from options import Settings

import sparsecomm as sc


class ExponentialWarmup:
    """Density that falls geometrically over the first steps, as in Deep Gradient Compression (Lin et al. 2018).

    Args:
        first: Density of step 0.
        final: Density from step ``steps`` on.
        steps: Length of the warm-up.
    """

    def __init__(self, first: float, final: float, steps: int) -> None:
        self.first, self.final, self.steps = first, final, steps

    def __call__(self, step: int) -> float:
        """Density of a step."""
        return self.final if step >= self.steps else self.first * (self.final / self.first) ** (step / self.steps)


def make_density(settings: Settings) -> float | Callable[[int], float]:
    """The share to send: a number, or a schedule over the steps."""
    if not settings.warmup_steps:
        return settings.density
    if settings.warmup_kind == "exp":
        return ExponentialWarmup(settings.warmup_densities[0], settings.density, settings.warmup_steps)
    stage = settings.warmup_steps // len(settings.warmup_densities)
    return sc.Warmup(settings.warmup_densities, steps_per_stage=stage, final=settings.density)


def make_feedback(settings: Settings) -> sc.ErrorFeedback | sc.MomentumCorrection | None:
    """What becomes of gradients that are not sent."""
    if settings.feedback == "none":
        return None
    if settings.feedback == "dgc":  # clips before momentum, as the whole gradient is not known after it
        return sc.MomentumCorrection(momentum=settings.averaging, nesterov=settings.nesterov, clip_norm=settings.clip)
    return sc.ErrorFeedback()


def make_state(settings: Settings) -> sc.SparseState | None:
    """The compressor the command line asks for; None for plain DDP."""
    if settings.compressor == "none":
        return None
    compressor: sc.Compressor = sc.Dense()
    if settings.sparse:
        kind = sc.TopK if settings.compressor == "topk" else sc.ThresholdTopK
        compressor = kind(density=make_density(settings))
    return sc.SparseState(
        compressor,
        feedback=make_feedback(settings),
        value_codec=settings.value_codec,
        index_codec=settings.index_codec,
        collective=settings.collective,
    )
