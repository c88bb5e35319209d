"""Methods that go wrong, for the tests of the training benches: import it with `--plugins broken_methods`."""

from __future__ import annotations

import time

import torch.distributed as dist
from torch import nn

from sparsecomm.tools.benches.methods import METHODS, Attached, method


@method("fails-on-rank-1", default=False)
def fails_on_rank_1(model: nn.Module, density: float) -> Attached:
    """Like plain DDP, but rank 1 fails between backward and the optimizer of its first step."""
    plain = METHODS["ddp-gloo"].attach(model, density)

    def average() -> None:
        if dist.get_rank() == 1:
            raise ValueError("rank 1 has had enough")

    return Attached(plain.model, plain.step_bytes, average=average)


@method("fails-everywhere", default=False)
def fails_everywhere(model: nn.Module, density: float) -> Attached:
    """Refuses to start."""
    raise RuntimeError("not on this machine\nand more that nobody wants in a table")


@method("hangs", default=False)
def hangs(model: nn.Module, density: float) -> Attached:
    """Never ends its first step."""
    return Attached(model, lambda step: 0, average=lambda: time.sleep(3600))


@method("needs-what-is-not-there", package="a_package_that_nobody_has", default=False)
def needs_what_is_not_there(model: nn.Module, density: float) -> Attached:
    """Cannot run."""
    raise AssertionError("it must not be attached")
