"""Where buckets are exchanged: on the host, or beside their GPU with pinned buffers for what travels."""

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
    """Where the buckets of one device are exchanged.

    Attributes:
        device: theirs.
        side: in which order work is done there.
        arena: gives buffers for messages, on the host; pinned for a GPU.
        memory: gives work buffers on the device; on the host the same arena.
    """

    device: torch.device
    side: Side
    arena: Arena
    memory: Arena

    def home(self, collective: str) -> torch.device:
        """Returns where a bucket's residual lives: with the gradient if the collective works there, else the host."""
        return self.device if method_named(collective).on_device else _HOST

    def steps(
        self, channel: Channel, bucket: BucketMemory, flat: Callable[[Arena], torch.Tensor], plan: Plan
    ) -> CollectiveSteps[BucketReport]:
        """Exchanges a bucket. Collective. To be driven by `side`.

        Args:
            channel: the ranks.
            bucket: Mutated; its memories are where `home` says.
            flat: returns the gradient, which is overwritten with the average, given an arena on its device.
            plan: what to do.
        """
        grad = flat(self.memory)
        if self.home(plan.collective) == grad.device:
            return (yield from exchange(channel, bucket, grad, plan, self.arena, self.memory))
        whole = self.arena.get((bucket.index, "whole"), grad.numel(), grad.dtype)
        self.side.fetch(grad, whole)
        report = yield from exchange(channel, bucket, whole, plan, self.arena)
        grad.copy_(whole, non_blocking=True)
        return report

    def in_order(self, call: Callable[..., None]) -> Callable[..., None]:
        """Returns a function that does the same, what it gives the device behind what was given `side` before."""

        def run(*args: Any) -> None:
            with self.side.active():
                call(*args)

        return run


class Lanes:
    """The places of one state, made when they are first needed.

    Args:
        arena: of the host.
    """

    def __init__(self, arena: Arena) -> None:
        self._host = Lane(_HOST, side_of(_HOST), arena, arena)
        self._of: dict[torch.device, Lane] = {_HOST: self._host}

    def of(self, device: torch.device) -> Lane:
        """Returns the place of a device; the host's for a device whose gradients are going to be refused."""
        if device.type != "cuda":
            return self._host
        place = self._of.get(device)
        if place is None:
            place = self._of[device] = Lane(device, side_of(device), Arena(pinned=True), Arena(device))
        return place
