"""The settings that all servers of a job share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sparsecomm.compress import Compressor
from sparsecomm.ps.modes import Mode, Synchronous
from sparsecomm.ps.protocol.payloads import PUSH, Origin
from sparsecomm.ps.protocol.sharding import ShardSpec
from sparsecomm.types import ValueCodec

__all__ = ["OptimizerFactory", "Rules"]

OptimizerFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of a shard from its 1-D pieces of parameters, which have `ps_name` and `ps_shape`."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The settings that all servers of a job share.

    Attributes:
        optimizer: Makes a shard's optimizer.
        workers: Ranks of the workers at the start.
        world: Number of ranks at the start.
        mode: How far workers may run apart.
        pull: Selects the changes since a worker's last pull that are sent to it; None sends whole shards.
        pull_codec: Codec of the values of sparse pulls.
        rate: Learning rate by number of updates done, in place of the optimizer's `lr`; rates.py says which rates
            groups with another one get. None leaves the optimizer's.
    """

    optimizer: OptimizerFactory
    workers: tuple[int, ...]
    world: int
    mode: Mode = field(default_factory=Synchronous)
    pull: Compressor | None = None
    pull_codec: ValueCodec = ValueCodec.FP16
    rate: Callable[[int], float] | None = None

    def push_origin(self, spec: ShardSpec, worker: int, clock: int) -> Origin:
        """Returns the origin that a worker's push must name. A worker that joined counts itself among the ranks."""
        return Origin(PUSH, spec, worker, max(self.world, worker + 1), clock)
