"""What servers of a job do alike, what each does beside, and what they count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

import torch

from sparsecomm.compress import Compressor
from sparsecomm.ps.modes import Mode, Synchronous
from sparsecomm.types import ValueCodec

if TYPE_CHECKING:
    from sparsecomm.ps.server.shard import Shard

__all__ = ["OptimizerFactory", "Rules", "ServerOptions"]

OptimizerFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of a shard from its 1-D pieces of parameters, which have `ps_name` and `ps_shape`."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What all servers of a job do alike.

    Attributes:
        optimizer: makes a shard's optimizer.
        workers: their ranks at the start.
        world: ranks in all.
        mode: how far workers may run apart.
        pull: selects what a worker is sent of the changes since its last pull; None sends whole shards.
        pull_codec: how sparse pulls write values.
        rate: learning rate by number of updates done; None leaves the optimizer's own.
    """

    optimizer: OptimizerFactory
    workers: tuple[int, ...]
    world: int
    mode: Mode = field(default_factory=Synchronous)
    pull: Compressor | None = None
    pull_codec: ValueCodec = ValueCodec.FP16
    rate: Callable[[int], float] | None = None

    def world_of(self, sender: int) -> int:
        """Returns the number of ranks that a sender's payloads must name: one that joined counts itself."""
        return max(self.world, sender + 1)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server does beside serving.

    Attributes:
        servers: ranks of all servers, by index.
        replicate: whether each shard is kept on the next server, too.
        restore: gives a new shard its checkpoint, if there is one.
        saved: called with a shard after every update of it; may save it.
        now: seconds, monotonic.
    """

    servers: tuple[int, ...]
    replicate: bool
    restore: Callable[[Shard], None] | None = None
    saved: Callable[[Shard], None] | None = None
    now: Callable[[], float] = monotonic

    def save(self, shard: Shard, events: list[str]) -> None:
        """Lets a new version be saved. A full disk must not end training: it becomes an event."""
        try:
            if self.saved is not None:
                self.saved(shard)
        except OSError as error:
            events.append(f"version {shard.version} of shard {shard.spec.index} was not saved: {error}")
