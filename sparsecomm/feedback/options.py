"""Options of error feedback, momentum correction and Adam correction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sparsecomm.errors import ConfigError

__all__ = ["AdamCorrection", "ErrorFeedback", "Feedback", "MomentumCorrection"]


@dataclass(frozen=True)
class ErrorFeedback:
    """Error feedback (Seide et al. 2014, Karimireddy et al. 2019).

    acc = gradient + residual is compressed, and residual = acc - sent, so value rounding is kept as well. With
    ``feedback=None`` instead, elements that are not sent are dropped (only for comparison, since it converges worse).
    """

    memories: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class MomentumCorrection:
    """Momentum before compression (Deep Gradient Compression, Lin et al. 2018); use an optimizer without momentum.

    u = m u + g, v = v + u, and the largest elements of v are sent (Nesterov: u = m (u + g), v = v + u + g).

    Before that, each rank clips its gradient g to clip_norm / sqrt(P), or, if `aligned`, to clip_norm / sqrt(a) with
    the alignment a of the gradients: their average is shorter than they are by sqrt(a). If `aligned`, the squared norm
    that is clipped is a |g|^2 + (1 - a) u with the usual value u of |g|^2 (`Clipping`). When the first bucket is sent,
    the norm over all buckets is not known yet. So each bucket is clipped by itself, to sqrt(s) of that, with the
    bucket's share s of the model's elements; if `aligned`, s is the mean of that and of the bucket's share of the
    gradient's squared norm in earlier steps.

    Attributes:
        momentum: m, in [0, 1).
        nesterov: whether to use Nesterov momentum.
        masking: whether u is zeroed where v was sent (factor masking), so that stale momentum does not accumulate.
        clip_norm: norm to which the global gradient is clipped; None to not clip.
        aligned: whether the ranks measure how far they agree (`Alignment`). `sparsecomm.optim.SGD` sets it.
    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True
    clip_norm: float | None = None
    aligned: bool = False

    memories: ClassVar[tuple[str, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        _check_decay("MomentumCorrection.momentum", self.momentum)
        _check_flag("MomentumCorrection.nesterov", self.nesterov)
        _check_flag("MomentumCorrection.masking", self.masking)
        _check_clip("MomentumCorrection.clip_norm", self.clip_norm)
        _check_flag("MomentumCorrection.aligned", self.aligned)


@dataclass(frozen=True)
class AdamCorrection:
    """Adam before compression; use it with `torch.optim.SGD(lr, weight_decay=...)` without momentum.

    Each rank computes Adam's update u = m / (sqrt(v) + eps) from its gradient, with both moments bias-corrected. The
    largest elements of residual + u are sent. If Adam ran after error feedback on gradients, it would see each
    coordinate as rare large spikes, which its second moment damps. Here the second moment sees every gradient, and
    compression delays finished updates. The weight_decay of SGD acts like that of AdamW, decoupled. With one rank and
    density 1 the result is AdamW.

    Attributes:
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        masking: whether m is zeroed at the positions of sent elements (DGC's factor masking).
        clip_norm: norm to which the global gradient is clipped, as in `MomentumCorrection`; None to not clip.
        aligned: whether the ranks measure how far they agree (`Alignment`), and v is scaled from the second moment of a
            rank's gradient to that of the average. `sparsecomm.optim.AdamW` sets it.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    masking: bool = False
    clip_norm: float | None = None
    aligned: bool = False

    memories: ClassVar[tuple[str, ...]] = ("velocity", "second_moment")

    def __post_init__(self) -> None:
        _check_decay("AdamCorrection.beta1", self.beta1)
        _check_decay("AdamCorrection.beta2", self.beta2)
        _check_flag("AdamCorrection.masking", self.masking)
        _check_clip("AdamCorrection.clip_norm", self.clip_norm)
        _check_flag("AdamCorrection.aligned", self.aligned)
        if not _is_number(self.eps) or not 0.0 < self.eps < math.inf:
            raise ConfigError(f"AdamCorrection.eps must be a positive number, got {self.eps!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_decay(name: str, value: float) -> None:
    if not _is_number(value):
        raise ConfigError(f"{name} must be a number in [0, 1), got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} must be in [0, 1), got {value!r}")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def _check_clip(name: str, value: float | None) -> None:
    if value is not None and (not _is_number(value) or not (math.isfinite(value) and value > 0)):
        raise ConfigError(f"{name} must be a positive number or None, got {value!r}")


Feedback = ErrorFeedback | MomentumCorrection | AdamCorrection
"""Any kind of feedback."""
