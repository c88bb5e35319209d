"""What both optimizers share: the state they work with, the step-ahead, and checks."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch

from sparsecomm.ddp import SparseState
from sparsecomm.errors import ConfigError, StateError
from sparsecomm.feedback import Feedback
from sparsecomm.optim.ahead import StepAhead
from sparsecomm.runtime.shards import local_part

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
        self._ours = {id(p) for p in module.parameters()}
        self.sparse_state = state
        super().__init__(params, defaults)
        me = weakref.ref(self)
        self._step_ahead = ahead = StepAhead(state, lambda: _groups_of(me()), lambda: _prepare(me()))
        feedback = self._feedback()
        if type(feedback) is type(state.config.feedback):
            state.follow(feedback)
        else:
            state.update(feedback=feedback)
        ahead.attach(module)
        weakref.finalize(self, ahead.detach).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """Refuses copies and pickles: a second optimizer would move the same parameters."""
        raise StateError(f"{type(self).__name__} cannot be copied or pickled; save its state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as for any torch optimizer.

        Raises:
            ConfigError: if a parameter is not in the state's model, or an option is not acceptable.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay"):
            value = group[name]
            if not (isinstance(value, (int, float, torch.Tensor)) and 0.0 <= float(value) < math.inf):
                raise ConfigError(f"{type(self).__name__}: {name} must be a number >= 0, got {value!r}")
        if any(id(p) not in self._ours for p in group["params"]):
            raise ConfigError(f"{type(self).__name__} was given parameters that its SparseState's model does not have")

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

    def prepare(self) -> None:
        """Gives the state the betas or the momentum of the coming step, which a scheduler may have changed.

        Raises:
            ConfigError: if the state has another kind of feedback by now.
        """
        wanted, present = self._feedback(), self.sparse_state.config.feedback
        if type(wanted) is not type(present):
            raise ConfigError(
                f"{type(self).__name__} needs {type(wanted).__name__}, but the SparseState was changed to {present!r}; "
                "leave feedback= out of state.update"
            )
        if wanted != present:
            self.sparse_state.follow(wanted)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters by the averaged updates in their `.grad`. They are equal on all ranks afterwards.

        Args:
            closure: computes the loss anew, as for any torch optimizer.

        Raises:
            ConfigError: if another optimizer has taken over the model, if the state's feedback was changed, or if
                something scaled the averages.
        """
        if not self._step_ahead.attached:
            raise ConfigError(f"this {type(self).__name__} was replaced: a later one trains the same model")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.prepare()
        self._step_ahead.back()
        self._check_untouched()
        with torch.no_grad():
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    updates = [local_part(p.grad) for p in params if p.grad is not None]
                    self._update(group, [local_part(p) for p in params], updates)
        return loss

    def _check_untouched(self) -> None:
        """Checks that the averages are as they were delivered.

        Raises:
            ConfigError: if they were scaled, as by `clip_grad_norm_`.
        """
        delivered = self.sparse_state.delivered()
        parameters = (p for group in self.param_groups for p in group["params"]) if delivered else ()
        for p in parameters:
            if id(p) not in delivered or p.grad is None:
                continue
            grad, like = local_part(p.grad), local_part(p)
            if grad.stride() != like.stride() or not torch.ops.aten.is_non_overlapping_and_dense(grad):
                continue
            place, value = delivered[id(p)]
            found = float(grad.as_strided((grad.numel(),), (1,))[place])
            if found != 0.0 and math.isfinite(found) and abs(found / value - 1.0) > _ROUNDING:
                raise ConfigError(
                    f"something scaled the averages in .grad by {found / value:.3g} between backward and step. They "
                    f"are finished updates, not gradients, so clip_grad_norm_ must not touch them: pass max_norm= to "
                    f"{type(self).__name__}, which clips before compression. With a GradScaler, pass scaler= to the "
                    "SparseState"
                )

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
        """Updates the parameters of one group, in place."""
        raise NotImplementedError


def _groups_of(optimizer: AveragedOptimizer | None) -> list[dict[str, Any]]:
    """Returns the groups as they are now: loading a state dict replaces the list."""
    return [] if optimizer is None else optimizer.param_groups


def _prepare(optimizer: AveragedOptimizer | None) -> None:
    if optimizer is not None:
        optimizer.prepare()
