"""Step-ahead: moves the parameters to where the residuals are expected to take them, and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo  # loads the compiler only when it is called

from sparsecomm.ddp import SparseState, Waiting
from sparsecomm.runtime.shards import local_part

__all__ = ["StepAhead"]

_LEAST = 1e-3  # a rate that falls by more in one step is not followed

_current: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[StepAhead]] = weakref.WeakKeyDictionary()


class StepAhead:
    """Moves the parameters of one optimizer ahead of the averaged steps, and back, bit for bit.

    A rank that computes gradients at the averaged parameters x knows nothing of what it still holds back, and adds the
    same direction again and again. So gradients are taken at x - lr * a * r instead, with this rank's residual r and
    the alignment a of the residuals: the least-squares estimate of where x will be once all ranks have sent their
    residuals (step-ahead error feedback, Xu and Huang 2020, who have a = 1).

    A residual holds updates that the rate multiplies only when they are applied, which may be many steps later. So
    that they count with the rate of the step that computed them, residuals are multiplied by the old rate over the new
    one whenever the rate changes. `residual_lr` in a group is the rate for which they are scaled.

    Parameters are ahead only from a forward pass in training mode to the end of the backward pass, when the state is
    given the last bucket. A pass in evaluation mode, `state_dict` and `load_state_dict` of the model bring them back,
    too, and so does the end of the optimizer.

    Args:
        state: the state whose residuals are applied.
        groups: returns the optimizer's groups, whose rates may change.
        prepare: called before a forward pass in training mode.

    Attributes:
        attached: whether passes of the module move the parameters. Another optimizer of the same model ends that.
    """

    def __init__(
        self, state: SparseState, groups: Callable[[], Sequence[dict[str, Any]]], prepare: Callable[[], None]
    ) -> None:
        self.attached = False
        self._state = state
        self._groups = groups
        self._prepare = prepare
        self._moved: list[torch.Tensor] = []
        self._saved: list[torch.Tensor] = []
        self._at_step = -1  # the state's step for which the parameters are ahead; -1: they are not
        self._handles: list[Any] = []

    def attach(self, module: torch.nn.Module) -> None:
        """Moves the parameters by themselves from now on, with the passes of a module."""
        before = _current.get(module, lambda: None)()
        if before is not None:
            before.detach()
        _current[module] = weakref.ref(self)
        any_module: Any = module  # torch has no types for the last two
        self._handles = [
            module.register_forward_pre_hook(_Hook(self, "before_forward"), prepend=True),
            any_module.register_state_dict_pre_hook(_Hook(self, "before_access")),
            any_module.register_load_state_dict_pre_hook(_Hook(self, "before_access")),
        ]
        self._state.at_last_bucket = _Hook(self, "before_access")
        self.attached = True

    def detach(self) -> None:
        """Moves the parameters back for good."""
        self.back()
        for handle in self._handles:
            handle.remove()
        self._handles, self.attached = [], False

    @_disable_dynamo  # a compiled model calls it, and would compile it anew for every step
    def before_forward(self, module: torch.nn.Module, _: object) -> None:
        """Moves the parameters as the coming pass of the module needs them."""
        if not module.training:
            self.back()
        elif torch.is_grad_enabled():
            self._prepare()
            self.ahead()

    def before_access(self, *_: object) -> None:
        """Moves the parameters back before they are saved, loaded or updated."""
        self.back()

    @torch.no_grad()
    def ahead(self) -> None:
        """Moves the parameters ahead; does nothing if they are there already."""
        if self._at_step == self._state.step:
            return
        self.back()
        waiting = [(g, self._state.waiting(g["params"])) for g in self._groups()]
        moved = [local_part(w.parameter).data for _, found in waiting for w in found]
        if [t.data_ptr() for t in moved] != [t.data_ptr() for t in self._moved]:
            self._saved = [torch.empty_like(t) for t in moved]
        self._moved = moved
        if moved:
            torch._foreach_copy_(self._saved, moved)
        for group, found in waiting:
            _follow_rate(group, found)
            _subtract(found, float(group["lr"]))
        self._at_step = self._state.step

    @torch.no_grad()
    def back(self) -> None:
        """Moves the parameters back to the averaged ones; does nothing if they are there already."""
        if self._at_step >= 0 and self._moved:
            # Through .data: autograd must not take this for a change of what a pending backward pass needs.
            torch._foreach_copy_(self._moved, self._saved)
        self._at_step = -1


class _Hook:
    """A hook that calls a method of a `StepAhead` as long as that is alive.

    A copy of it, in a copied or unpickled module, does nothing: the optimizer does not own that module's parameters.
    """

    def __init__(self, owner: StepAhead | None = None, method: str = "") -> None:
        self._owner = (lambda: None) if owner is None else weakref.ref(owner)
        self._method = method

    def __call__(self, *args: object) -> None:
        owner = self._owner()
        if owner is not None:
            getattr(owner, self._method)(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _follow_rate(group: dict[str, Any], found: Sequence[Waiting]) -> None:
    """Scales the residuals so that the product of rate and residual stays the same when the rate changes, in place."""
    lr = float(group["lr"])
    before = group.setdefault("residual_lr", lr)
    # A schedule may end at a rate of nothing, or at one of rounding errors; what waits must stay finite.
    if lr == before or lr <= _LEAST * before:
        return
    if found:
        torch._foreach_mul_([w.residual for w in found], before / lr)
    group["residual_lr"] = lr


def _subtract(found: Sequence[Waiting], lr: float) -> None:
    """Subtracts lr * alignment * residual from each parameter, in as few calls as alignments differ."""
    by_alignment: dict[float, list[Waiting]] = {}
    for w in found:
        by_alignment.setdefault(w.alignment, []).append(w)
    for alignment, some in by_alignment.items():
        data = [local_part(w.parameter).data for w in some]
        torch._foreach_add_(data, [w.residual.to(w.parameter.device) for w in some], alpha=-lr * alignment)
