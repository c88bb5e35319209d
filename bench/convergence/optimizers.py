"""Optimizers of the training scripts, both with decoupled weight decay, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from options import ADAM_BETA2, Settings
from torch import nn

import sparsecomm as sc


class DecoupledSGD(torch.optim.SGD):
    """SGD whose weight decay does not pass through the momentum (SGDW, Loshchilov and Hutter 2019).

    Every step shrinks the parameters of a group by ``lr * decay``, as AdamW does.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Shrinks the parameters, then updates them. Mutates the parameters."""
        for group in self.param_groups:
            if group["decay"]:
                torch._foreach_mul_(group["params"], 1.0 - group["lr"] * group["decay"])
        return super().step(closure)


def make_optimizer(settings: Settings, model: nn.Module, state: sc.SparseState | None) -> torch.optim.Optimizer:
    """Returns AdamW or SGD with weight decay on the matrices only; without momentum if the exchange applies it."""
    if settings.feedback == "ahead" and state is not None:
        return _make_ahead(settings, model, state)
    momentum = 0.0 if settings.updates_before else settings.averaging
    adam = settings.optimizer == "adamw" and settings.feedback != "adam"
    name = "weight_decay" if adam else "decay"
    groups = _groups(model, name, settings.weight_decay)
    if adam:
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(momentum, ADAM_BETA2), fused=True)
    return DecoupledSGD(groups, lr=settings.lr, momentum=momentum, nesterov=settings.nesterov and momentum > 0)


def _groups(model: nn.Module, name: str, decay: float) -> list[dict[str, Any]]:
    """Returns two groups: the matrices, whose option `name` is the decay, and the rest, which does not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, name: decay}, {"params": vectors, name: 0.0}]


def _make_ahead(settings: Settings, model: nn.Module, state: sc.SparseState) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        decay *= 1.0 - settings.averaging  # it passes through the momentum, unlike that of DecoupledSGD
    groups = _groups(model, "weight_decay", decay)
    if settings.optimizer == "adamw":
        betas = (settings.averaging, ADAM_BETA2)
        return sc.optim.AdamW(groups, state, lr=settings.lr, betas=betas, max_norm=settings.clip)
    return sc.optim.SGD(
        groups,
        state,
        lr=settings.lr,
        momentum=settings.averaging,
        nesterov=settings.nesterov,
        max_norm=settings.clip,
    )


def rate(settings: Settings, step: int) -> float:
    """Returns the learning rate of a step: linear warm-up over a twentieth of the run, then a cosine to a tenth."""
    rising = max(1, settings.steps // 20)
    if step < rising:
        return settings.lr * (step + 1) / rising
    done = (step - rising) / max(1, settings.steps - rising)
    return settings.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))
