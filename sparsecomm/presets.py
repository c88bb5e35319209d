"""Option sets named by the papers they come from."""

from __future__ import annotations

from typing import Any

from sparsecomm.compress import ChunkTopK, CyclicTopK, Dense, Geometric, ThresholdTopK, TopK, Warmup
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import AdamCorrection, ErrorFeedback, MomentumCorrection

__all__ = ["PRESETS", "preset"]


def _dgc(steps_per_epoch: int = 1000, momentum: float = 0.9, clip_norm: float | None = None) -> SparseConfig:
    """Deep Gradient Compression (Lin et al. 2018): momentum correction, factor masking, warm-up to 0.1%.

    The optimizer then has no momentum of its own.
    """
    return SparseConfig(
        compressor=TopK(density=Warmup((0.25, 0.063, 0.015, 0.004), steps_per_stage=steps_per_epoch, final=0.001)),
        feedback=MomentumCorrection(momentum=momentum, clip_norm=clip_norm),
    )


def _ef_topk(density: float = 0.01) -> SparseConfig:
    """Top-k with error feedback (Stich et al. 2018), exact selection, fp32 values."""
    return SparseConfig(compressor=TopK(density=density), feedback=ErrorFeedback(), value_codec="fp32")


def _adam_topk(
    density: float = 0.01,
    warmup_steps: int = 1500,
    beta1: float = 0.5,
    beta2: float = 0.95,
    clip_norm: float | None = 1.0,
) -> SparseConfig:
    """Top-k of Adam updates (`AdamCorrection`), for runs that would use AdamW; the optimizer is SGD without momentum.

    The density falls geometrically from 25% over the warm-up: half the run's steps did well, with about twice the
    learning rate that suits AdamW with beta1 = 0.9. What was measured is in docs/convergence.md.
    """
    return SparseConfig(
        compressor=TopK(density=Geometric(0.25, density, warmup_steps)),
        feedback=AdamCorrection(beta1=beta1, beta2=beta2, clip_norm=clip_norm),
    )


def _oktopk(density: float = 0.01) -> SparseConfig:
    """Top-k by a threshold reused for 32 steps (Ok-Topk, Li and Hoefler 2022), with this version's allgather."""
    return SparseConfig(compressor=ThresholdTopK(density=density, interval=32), feedback=ErrorFeedback())


def _gradientflow(
    density: float = 0.1, chunk: int = 32768, steps_per_epoch: int = 1000, momentum: float = 0.9
) -> SparseConfig:
    """Coarse-grained sparse communication (GradientFlow, Sun et al. 2019): top chunks, 16 bits, momentum correction.

    The density halves from 80% on, an epoch each. The optimizer then has no momentum of its own. Give DDP a
    bucket_cap_mb of many chunks: a chunk of 32,768 elements is 128 KiB of float32.
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
    """No compression: float32 around a ring."""
    return SparseConfig(compressor=Dense())


PRESETS = {
    "adam-topk": _adam_topk,
    "dense": _dense,
    "dgc": _dgc,
    "ef-topk": _ef_topk,
    "gradientflow": _gradientflow,
    "oktopk": _oktopk,
    "scalecom": _scalecom,
}
"""Functions that make a `SparseConfig`, by name."""


def preset(name: str, **options: Any) -> SparseConfig:
    """Returns a named option set; print it, or change it with `.change(...)`.

    Args:
        name: one of `PRESETS`.
        options: arguments of that preset, e.g. ``density=0.001``.

    Raises:
        ConfigError: for an unknown name or argument.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; known are {', '.join(PRESETS)}")
    try:
        return PRESETS[name](**options)
    except TypeError as error:
        raise ConfigError(f"preset {name!r}: {error}") from None
