"""Lanes: for each device, the order of work and the buffers of exchanges. A GPU has pinned buffers for messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsecomm.exchange import Plan, exchange
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import BucketMemory
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.device import Side, side_of
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["Lane", "Lanes"]

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Lane:
    """The exchanges of the buckets on one device.

    Attributes:
        device: device of the buckets.
        side: orders the exchanges' work on the device.
        arena: gives buffers for messages, on the host; pinned if the device is a GPU.
        workspace: gives work buffers on the device; the same as `arena` if that is the host.
    """

    device: torch.device
    side: Side
    arena: Arena
    workspace: Arena

    def home(self, collective: str) -> torch.device:
        """Returns the device of a bucket's residual: the gradient's if the collective works there, else the host."""
        return self.device if method_named(collective).on_device else _HOST

    def steps(
        self, channel: Channel, bucket: BucketMemory, flat: Callable[[Arena], torch.Tensor], plan: Plan
    ) -> CollectiveSteps[BucketReport]:
        """Exchanges a bucket. Collective. `side.drive` must run these steps.

        Args:
            channel: the ranks.
            bucket: the bucket's memory, on the device that `home` returns. Mutated.
            flat: returns the gradient, given an arena on its device. The gradient is overwritten with the average.
            plan: how the bucket is exchanged.
        """
        grad = flat(self.workspace)
        if self.home(plan.collective) == grad.device:
            return (yield from exchange(channel, bucket, grad, plan, self.arena, self.workspace))
        whole = self.arena.get((bucket.index, "whole"), grad.numel(), grad.dtype)
        self.side.fetch(grad, whole)
        report = yield from exchange(channel, bucket, whole, plan, self.arena)
        grad.copy_(whole, non_blocking=True)
        return report

    def in_order(self, call: Callable[..., None]) -> Callable[..., None]:
        """Returns a version of `call` whose device work is queued behind the work already given to `side`."""

        def run(*args: Any) -> None:
            with self.side.active():
                call(*args)

        return run


class Lanes:
    """The lanes of one state, one for each device. Each is made when it is first needed.

    Args:
        arena: arena of the host's lane.
    """

    def __init__(self, arena: Arena) -> None:
        self._host = Lane(_HOST, side_of(_HOST), arena, arena)
        self._of: dict[torch.device, Lane] = {_HOST: self._host}

    def of(self, device: torch.device) -> Lane:
        """Returns the lane of a device. Devices other than CPU and CUDA get the host's; their gradients are refused."""
        if device.type != "cuda":
            return self._host
        lane = self._of.get(device)
        if lane is None:
            lane = self._of[device] = Lane(device, side_of(device), Arena(pinned=True), Arena(device))
        return lane
