"""Named sets of options, most of them from papers."""

from __future__ import annotations

from typing import Any

from sparsecomm.compress import ChunkTopK, CyclicTopK, Dense, Geometric, ThresholdTopK, TopK, Warmup
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import AdamCorrection, ErrorFeedback, MomentumCorrection

__all__ = ["PRESETS", "preset"]


def _dgc(steps_per_epoch: int = 1000, momentum: float = 0.9, clip_norm: float | None = None) -> SparseConfig:
    """Deep Gradient Compression (Lin et al. 2018): momentum correction, factor masking, warm-up to 0.1%.

    Use an optimizer without momentum.
    """
    return SparseConfig(
        compressor=TopK(density=Warmup((0.25, 0.063, 0.015, 0.004), steps_per_stage=steps_per_epoch, final=0.001)),
        feedback=MomentumCorrection(momentum=momentum, clip_norm=clip_norm),
    )


def _ef_topk(density: float = 0.01) -> SparseConfig:
    """Top-k with error feedback (Stich et al. 2018), exact selection, fp32 values."""
    return SparseConfig(compressor=TopK(density=density), feedback=ErrorFeedback(), value_codec="fp32")


def _adamw(density: float = 0.01, warmup_steps: int = 300) -> SparseConfig:
    """Top-k of Adam's updates for `sparsecomm.optim.AdamW`, which takes dense's settings.

    The density falls geometrically from 25% during the warm-up. A tenth of the run's steps or more is a good warm-up.
    Values have 8 bits, and their rounding stays in the residual. docs/convergence.md has the measurements.
    """
    return SparseConfig(
        compressor=TopK(density=Geometric(0.25, density, warmup_steps)),
        feedback=AdamCorrection(aligned=True),
        value_codec="int8",
    )


def _sgd(density: float = 0.01, warmup_steps: int = 300) -> SparseConfig:
    """Top-k of momentum for `sparsecomm.optim.SGD`, which takes dense's settings; the density as for `_adamw`."""
    return SparseConfig(
        compressor=TopK(density=Geometric(0.25, density, warmup_steps)),
        feedback=MomentumCorrection(masking=False, aligned=True),
        value_codec="int8",
    )


def _adam_topk(
    density: float = 0.01,
    warmup_steps: int = 1500,
    beta1: float = 0.5,
    beta2: float = 0.95,
    clip_norm: float | None = 1.0,
) -> SparseConfig:
    """Top-k of Adam updates (`AdamCorrection`) without step-ahead. Use SGD without momentum with it.

    It needs tuning, which "adamw" does not. The density falls geometrically from 25% during the warm-up. A warm-up of
    half the run's steps worked well, with about twice the learning rate that suits AdamW with beta1 = 0.9.
    """
    return SparseConfig(
        compressor=TopK(density=Geometric(0.25, density, warmup_steps)),
        feedback=AdamCorrection(beta1=beta1, beta2=beta2, clip_norm=clip_norm),
    )


def _oktopk(density: float = 0.01) -> SparseConfig:
    """Top-k by a threshold that is reused for 32 steps (Ok-Topk, Li and Hoefler 2022); any collective."""
    return SparseConfig(compressor=ThresholdTopK(density=density, interval=32), feedback=ErrorFeedback())


def _gradientflow(
    density: float = 0.1, chunk: int = 32768, steps_per_epoch: int = 1000, momentum: float = 0.9
) -> SparseConfig:
    """Coarse-grained sparse communication (GradientFlow, Sun et al. 2019): top chunks, 16 bits, momentum correction.

    The density starts at 80% and halves every epoch. Use an optimizer without momentum. Choose DDP's bucket_cap_mb so
    that a bucket holds many chunks: a chunk of 32,768 elements is 128 KiB of float32.
    """
    stages = tuple(d for d in (0.8, 0.4, 0.2) if d > density)
    return SparseConfig(
        compressor=ChunkTopK(density=Warmup(stages, steps_per_stage=steps_per_epoch, final=density), chunk=chunk),
        feedback=MomentumCorrection(momentum=momentum),
    )


def _scalecom(density: float = 0.01) -> SparseConfig:
    """Cyclic local top-k (ScaleCom, Chen et al. 2020) with plain error feedback, without its low-pass filter."""
    return SparseConfig(compressor=CyclicTopK(density=density), feedback=ErrorFeedback())


def _dense() -> SparseConfig:
    """No compression: float32 values, summed around a ring."""
    return SparseConfig(compressor=Dense())


PRESETS = {
    "adam-topk": _adam_topk,
    "adamw": _adamw,
    "dense": _dense,
    "dgc": _dgc,
    "ef-topk": _ef_topk,
    "gradientflow": _gradientflow,
    "oktopk": _oktopk,
    "scalecom": _scalecom,
    "sgd": _sgd,
}
"""Functions that make a `SparseConfig`, by name."""


def preset(name: str, **options: Any) -> SparseConfig:
    """Returns a named set of options. Print it to see them, and change them with `.change(...)`.

    Args:
        name: one of `PRESETS`.
        options: arguments of that preset, for example ``density=0.001``.

    Raises:
        ConfigError: for an unknown name or argument.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; known are {', '.join(PRESETS)}")
    try:
        return PRESETS[name](**options)
    except TypeError as error:
        raise ConfigError(f"preset {name!r}: {error}") from None
