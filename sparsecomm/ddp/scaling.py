"""The GradScaler of a state: the factor on its gradients, and whether a step may be skipped."""

from __future__ import annotations

import torch

__all__ = ["LossScaling"]


class LossScaling:
    """The GradScaler that multiplies the losses, if there is one.

    Attributes:
        scaler: the GradScaler; None without loss scaling.
    """

    def __init__(self) -> None:
        self.scaler: torch.amp.GradScaler | None = None

    def may_skip(self) -> bool:
        """Returns whether the optimizer may skip a step, with all its buckets, because of one bucket."""
        return self.scaler is not None and self.scaler.is_enabled()

    def grad_scale(self) -> float:
        """Returns the factor that gradients arrive multiplied by."""
        return float(self.scaler.get_scale()) if self.scaler is not None and self.may_skip() else 1.0
