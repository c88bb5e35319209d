"""AdamW for compressed gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from sparsecomm.ddp import SparseState
from sparsecomm.errors import ConfigError
from sparsecomm.feedback import AdamCorrection, Feedback
from sparsecomm.optim.base import AveragedOptimizer, Params

__all__ = ["AdamW"]

_LONGEST = 0.999  # decay of a second moment whose noise does not matter any more


def beta1_for(beta1: float, density: float) -> float:
    """Returns a decay for a first moment whose updates are held back: the one of the average, at a density of 1.

    What other ranks send moves the parameters by many steps at once, and a moment over ten gradients points for ten
    steps to where they were before. At a low density it therefore averages over the square root of as many gradients:
    3 for 10, a decay of 0.68 for 0.9. docs/convergence.md has the measurements.

    Args:
        beta1: decay in a dense run, in [0, 1).
        density: density, in (0, 1].
    """
    return 1.0 - math.pow(1.0 - beta1, (1.0 + density) / 2.0)


class AdamW(AveragedOptimizer):
    """AdamW with torch's arguments, for gradients that a `SparseState` compresses.

    Every rank computes Adam's update from its own gradient, and error feedback works on updates, so that the second
    moment sees every gradient, not rare spikes. Four things keep dense's settings valid:

    - Gradients are taken step-ahead: `StepAhead`.
    - A rank's second moment is scaled to that of the average gradient (`Alignment`). Otherwise the updates of P noisy
      ranks would average to less than the update of their average, as if the rate fell with P. It also averages over P
      times as many steps, at a decay of beta2^(1/P), and so over as many gradients as in a dense run. 1,000 steps are
      enough: the decay does not rise above 0.999, or beta2 if that is higher.
    - A rank's first moment averages over fewer steps, the fewer the lower the density: `beta1_for`.
    - Weight decay acts on the averaged parameters, as in AdamW.

    Parameters are equal on all ranks after a step, bit for bit.

    Args:
        params: parameters or groups of one model. Groups may differ in lr and weight_decay.
        state: state of the comm hook, registered with the model. Its feedback is replaced.
        lr: learning rate.
        betas: decays of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        max_norm: norm to which the gradient is clipped before compression, in place of `clip_grad_norm_`; None to not
            clip.

    Raises:
        ConfigError: for an option that is not acceptable, or a state without a model.
    """

    def __init__(
        self,
        params: Params,
        state: SparseState,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
    ) -> None:
        self._max_norm = max_norm
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ConfigError(f"AdamW: betas must be two numbers, got {betas!r}")
        super().__init__(params, state, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def _feedback(self) -> Feedback:
        beta1, beta2 = self._common("betas")
        state = self.sparse_state
        ranks = state.group_size()
        if ranks > 1:
            beta1 = beta1_for(beta1, state.config.compressor.density_at(state.step))
        dense = AdamCorrection(beta1, beta2, self._common("eps"), clip_norm=self._max_norm, aligned=True)
        return replace(dense, beta2=max(beta2, min(beta2 ** (1.0 / ranks), _LONGEST)))

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if decay:
            torch._foreach_mul_(params, 1.0 - lr * decay)
        torch._foreach_add_(params, updates, alpha=-lr)
