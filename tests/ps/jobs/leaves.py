"""A job whose worker 1 ends its training function by leaving the process, or hangs, in the way that an argument names.

A second argument is the timeout in seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

import sparsecomm as sc


def by_system_exit() -> None:
    raise SystemExit


LEAVE: dict[str, Callable[[], object]] = {
    "exit": lambda: exit(),
    "sys.exit(0)": lambda: sys.exit(0),
    "raise": by_system_exit,
    "sys.exit(3)": lambda: sys.exit(3),
    "os._exit(3)": lambda: os._exit(3),
    "text": lambda: sys.exit("no more data"),
    "sleep": lambda: time.sleep(1000),
}


class PlainSGD(torch.optim.Optimizer):
    """SGD with rate 1, which loads less than torch's."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Subtracts the gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad)


def train(rank: int, size: int) -> str:
    """Trains for three steps; worker 1 leaves after that."""
    model = torch.nn.Linear(4, 2, dtype=torch.float32)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    worker = sc.ps.Worker(model)
    for step in range(4):
        if rank == 1 and step == 3:
            LEAVE[sys.argv[1]]()
        model.zero_grad()
        model(torch.ones(4, dtype=torch.float32)).sum().backward()
        worker.step()
    return "returned"


outcome = sc.ps.run(train, optimizer=PlainSGD, timeout=float((*sys.argv, 30)[2]))
print(f"rank {outcome.rank}, {outcome.role}: {outcome.result or outcome.server.shards[0].gone}")  # type: ignore[union-attr]
