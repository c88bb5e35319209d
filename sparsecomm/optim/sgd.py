"""SGD with momentum for compressed gradients."""

from __future__ import annotations

from typing import Any

import torch

from sparsecomm.ddp import SparseState
from sparsecomm.errors import ConfigError
from sparsecomm.feedback import Feedback, MomentumCorrection
from sparsecomm.optim.base import AveragedOptimizer, Params

__all__ = ["SGD"]


class SGD(AveragedOptimizer):
    """SGD with momentum and torch's arguments, for gradients that a `SparseState` compresses.

    Every rank applies momentum to its own gradient before compression (DGC), without masking, and gradients are taken
    step-ahead (`StepAhead`). Parameters are equal on all ranks after a step, bit for bit.

    Weight decay acts on the averaged parameters. torch's SGD adds weight_decay * x to the gradient, before momentum,
    which multiplies it by 1 + m + m^2 + ... over the steps. The same factor, (1 - m^t) / (1 - m) in step t, is applied
    here to the present x instead of the earlier ones.

    Args:
        params: parameters or groups of one model. Groups may differ in lr and weight_decay.
        state: state of the comm hook, registered with the model. Its feedback is replaced.
        lr: learning rate.
        momentum: momentum.
        weight_decay: coupled weight decay (an L2 penalty), as in torch's SGD.
        nesterov: whether to use Nesterov momentum.
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
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_norm: float | None = None,
    ) -> None:
        self._max_norm = max_norm
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "since": -1}
        if nesterov and not momentum:
            raise ConfigError("SGD: nesterov=True needs a momentum above 0")
        super().__init__(params, state, options)

    def _feedback(self) -> Feedback:
        return MomentumCorrection(
            self._common("momentum"),
            nesterov=self._common("nesterov"),
            masking=False,
            clip_norm=self._max_norm,
            aligned=True,
        )

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
        lr, decay, momentum = float(group["lr"]), float(group["weight_decay"]), float(group["momentum"])
        # Counted by the state, whose steps go on in a rank without data under ddp.join().
        if group.setdefault("since", -1) < 0:
            group["since"] = self.sparse_state.step - 1
        if decay:
            steps = self.sparse_state.step - group["since"]
            summed = (1.0 - momentum**steps) / (1.0 - momentum)
            torch._foreach_mul_(params, 1.0 - lr * decay * summed)
        torch._foreach_add_(params, updates, alpha=-lr)
