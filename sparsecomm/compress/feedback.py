"""What is kept of a gradient that was not sent: options of error feedback and of momentum correction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsecomm.errors import ConfigError

__all__ = ["ErrorFeedback", "Feedback", "MomentumCorrection"]


@dataclass(frozen=True)
class ErrorFeedback:
    """Error feedback (Seide et al. 2014, Karimireddy et al. 2019).

    acc = gradient + residual is compressed and residual = acc - what was sent, value rounding included. With
    ``feedback=None`` in its place, what is not sent is dropped (for comparison only: it converges worse).
    """


@dataclass(frozen=True)
class MomentumCorrection:
    """Momentum before compression (Deep Gradient Compression, Lin et al. 2018); use an optimizer without momentum.

    u = m u + g, v = v + u, the largest of v are sent (Nesterov: u = m (u + g), v = v + u + g). Each rank clips its
    own gradient before: to clip_norm / sqrt(P), of which a bucket of n_b of the model's n elements gets the share
    sqrt(n_b / n), since the norm over all buckets is not known yet when the first one travels.

    Attributes:
        momentum: m, in [0, 1).
        nesterov: whether to look ahead.
        masking: whether u is zeroed where v was sent (factor masking), so that stale momentum does not carry on.
        clip_norm: norm that the global gradient is to be clipped to; None for no clipping.
    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.momentum, bool) or not isinstance(self.momentum, (int, float)):
            raise ConfigError(f"MomentumCorrection.momentum must be a number in [0, 1), got {self.momentum!r}")
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"MomentumCorrection.momentum must be in [0, 1), got {self.momentum!r}")
        for name in ("nesterov", "masking"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"MomentumCorrection.{name} must be True or False, got {getattr(self, name)!r}")
        clip = self.clip_norm
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float))):
            raise ConfigError(f"MomentumCorrection.clip_norm must be a positive number or None, got {clip!r}")
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise ConfigError(f"MomentumCorrection.clip_norm must be a positive number or None, got {clip!r}")


Feedback = ErrorFeedback | MomentumCorrection
"""Either kind of feedback."""
