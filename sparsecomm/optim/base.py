"""What both optimizers share: the state they work with, the step-ahead, and checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch

from sparsecomm.ddp import SparseState
from sparsecomm.errors import ConfigError
from sparsecomm.feedback import Feedback
from sparsecomm.optim.ahead import StepAhead

__all__ = ["AveragedOptimizer", "Params"]

_ROUNDING = 0.01  # float16 and bfloat16 round by less

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class AveragedOptimizer(torch.optim.Optimizer):
    """An optimizer whose gradients are averages of finished updates.

    The moments live in the state, one set a rank. Save `state.state_dict()` on every rank beside the model and this
    optimizer's own `state_dict()`, which holds rates and options alone.

    Args:
        params: parameters or groups, as for any torch optimizer.
        state: state of the comm hook. It must know its model: register the hook first, or pass ``model=`` to it.
        defaults: options of the groups.
    """

    def __init__(self, params: Params, state: SparseState, defaults: dict[str, Any]) -> None:
        if not isinstance(state, SparseState):
            raise ConfigError(f"{type(self).__name__} needs the SparseState of the comm hook, got {state!r}")
        module = state.module()
        if module is None:
            raise ConfigError(
                f"{type(self).__name__}: the model of this SparseState is unknown; call "
                "ddp.register_comm_hook(state, sparse_hook) before making the optimizer, or pass model= to SparseState"
            )
        super().__init__(params, defaults)
        known = {id(p) for p in module.parameters()}
        if any(id(p) not in known for g in self.param_groups for p in g["params"]):
            raise ConfigError(f"{type(self).__name__} was given parameters that its model does not have")
        self.sparse_state = state
        self._step_ahead = StepAhead(state, self.param_groups)
        self._step_ahead.attach(module)
        state.update(feedback=self._feedback())

    def _feedback(self) -> Feedback:
        """Returns the feedback that computes the moments."""
        raise NotImplementedError

    def _common(self, name: str) -> Any:
        """Returns an option that all groups share.

        Raises:
            ConfigError: if two groups differ in it.
        """
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ConfigError(f"{type(self).__name__}: all groups need the same {name}, got {values}")
        return values[0]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters by the averaged updates in their `.grad`. They are equal on all ranks afterwards.

        Args:
            closure: computes the loss anew, as for any torch optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        feedback = self._feedback()
        if feedback != self.sparse_state.config.feedback:
            self.sparse_state.follow(feedback)
        self._step_ahead.back()
        self._check_untouched()
        with torch.no_grad():
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._update(group, params, [p.grad for p in params if p.grad is not None])
        return loss

    def _check_untouched(self) -> None:
        """Checks that the averages are as they were delivered.

        Raises:
            ConfigError: if they were scaled, as by `clip_grad_norm_`.
        """
        delivered = self.sparse_state.delivered()
        parameters = (p for group in self.param_groups for p in group["params"]) if delivered else ()
        for p in parameters:
            if id(p) not in delivered or p.grad is None or not torch.ops.aten.is_non_overlapping_and_dense(p.grad):
                continue
            place, value = delivered[id(p)]
            found = float(p.grad.as_strided((p.numel(),), (1,))[place])
            if found != 0.0 and math.isfinite(found) and abs(found / value - 1.0) > _ROUNDING:
                raise ConfigError(
                    f"something scaled the averages in .grad by {found / value:.3g} between backward and step. They "
                    f"are finished updates, not gradients, so clip_grad_norm_ must not touch them: pass max_norm= to "
                    f"{type(self).__name__}, which clips before compression"
                )

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
        """Updates the parameters of one group, in place."""
        raise NotImplementedError
