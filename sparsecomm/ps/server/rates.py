"""The learning rates of an optimizer's parameter groups while one rate moves them all.

`rate` takes the place of the optimizer's own `lr`, and groups with another one keep their ratio to it. A shard may lack
the groups that have the own `lr`, so the optimizer of the whole model says which rate all shards refer to.
"""

from __future__ import annotations

import math

import torch

from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.rules import Rules

__all__ = ["Rates", "reference_rate"]


def reference_rate(rules: Rules, layout: ModelLayout) -> float:
    """Returns the learning rate that `rate` takes the place of: the optimizer's own, or the largest if no group has it.

    Args:
        rules: Rules of the job. Its optimizer is made for parameters of the model's sizes that take no memory.
        layout: Layout of the whole model.

    Returns:
        The rate; 0.0 if the optimizer's groups have none, or the job has no `rate`.
    """
    if rules.rate is None:
        return 0.0
    parameters = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32).expand(math.prod(shape)))
        parameter.ps_name, parameter.ps_shape = name, shape  # type: ignore[attr-defined]
        parameters.append(parameter)
    optimizer = rules.optimizer(parameters)
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    own = getattr(optimizer, "defaults", {}).get("lr")
    return float(own) if own in rates else max(rates, default=0.0)


class Rates:
    """The learning rates of an optimizer's groups.

    Args:
        optimizer: The optimizer, as its factory made it.
        reference: Learning rate that `set` takes the place of, as from `reference_rate`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reference: float) -> None:
        self._optimizer = optimizer
        rates = [group.get("lr") for group in optimizer.param_groups]
        self._ratios = [1.0 if r is None or not reference else float(r) / reference for r in rates]

    def set(self, rate: float) -> None:
        """Sets each group's learning rate to its share of `rate`. Mutates the optimizer."""
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio
