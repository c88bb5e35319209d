"""One shard as a worker sees it: error feedback on its gradient, and the payloads it pushes."""

from __future__ import annotations

import math

import torch

from sparsecomm import kernels
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import (
    BucketLayout,
    BucketMemory,
    Incoming,
    SelectedTaken,
    Taken,
    WholeTaken,
    take_all,
    take_some,
)
from sparsecomm.ps.protocol.payloads import PUSH, Selected, encode, everything
from sparsecomm.ps.protocol.sharding import ShardSpec
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import ValueCodec

__all__ = ["Part"]


class Part:
    """See the module's docstring.

    Args:
        spec: the shard.
        config: how to compress.
        sender: rank of the worker and number of ranks.
        clip: square of the share of `clip_norm` that this part of the gradient gets.
        arena: gives the buffers.

    Attributes:
        version: what was pulled last; -1 before the first pull.
        bucket: what was not sent yet, and the moments.
    """

    def __init__(
        self, spec: ShardSpec, config: SparseConfig, sender: tuple[int, int], *, clip: float, arena: Arena
    ) -> None:
        n = spec.numel
        lossless = config.compressor.is_dense and config.dense_values == ValueCodec.FP32
        memories = () if config.feedback is None else config.feedback.memories
        limit = getattr(config.feedback, "clip_norm", None)
        self.spec = spec
        self.version = -1
        self.bucket = BucketMemory(
            spec.index,
            BucketLayout((f"shard {spec.index}",), ((n,),), ((1,),)),
            residual=None if lossless and not memories else torch.zeros(n),
            velocity=torch.zeros(n) if "velocity" in memories else None,
            second_moment=torch.zeros(n) if "second_moment" in memories else None,
        )
        self._config = config
        self._sender = sender
        self._arena = arena
        self._clip = None if limit is None else float(limit) * math.sqrt(clip)
        self._all: torch.Tensor | None = None
        self._dropped = torch.empty(0)

    def take(self, grad: torch.Tensor, clock: int) -> Taken:
        """Adds a gradient to the residual and takes out what to send; `encode`, or `settle`, ends that.

        Args:
            grad: float32, shape (spec.numel,); must last until then.
            clock: pushes done before.
        """
        config, n = self._config, self.spec.numel
        incoming = Incoming(grad, config.feedback, clip_norm=self._clip)
        if config.compressor.is_dense or clock < config.dense_steps or n < config.dense_below:
            taken = take_all(self.bucket, incoming, self._arena)
            if self.bucket.residual is None and not bool(torch.isfinite(grad).all()):
                taken.added.nonfinite += 1
            return taken
        return take_some(self.bucket, incoming, config.compressor, config.compressor.k_for(n, clock), self._arena)

    def encode(self, taken: Taken, nonfinite: bool, clock: int) -> tuple[torch.Tensor, int]:
        """Writes what was taken, and makes that final: `write` and `settle` in one.

        Args:
            taken: committed; or undone, and nothing is sent, if the gradient was not finite.
            nonfinite: whether any part of the gradient was not.
            clock: pushes done before.

        Returns:
            The payload, in the arena, and its nonzeros.
        """
        if nonfinite:
            self.settle(taken, sent=False)
            nothing = torch.empty(0, dtype=torch.uint32), torch.empty(0)
            return self._payload(nothing, self._config.values, clock, True)[0], 0
        written = self.write(taken, clock)
        self.settle(taken, sent=True)
        return written

    def write(self, taken: Taken, clock: int) -> tuple[torch.Tensor, int]:
        """Returns the payload of what was taken, in the arena, and its nonzeros; `settle` must follow."""
        residual, codec = self.bucket.residual, self._config.values
        if isinstance(taken, SelectedTaken):
            selected: Selected = (taken.indices, taken.values)
        else:
            codec = self._config.dense_values
            selected = (self._everything(), taken.added.incoming.grad if residual is None else residual)
        payload, self._dropped = self._payload(selected, codec, clock, False)
        return payload, selected[1].numel()

    def settle(self, taken: Taken, *, sent: bool) -> None:
        """Makes final what was written: what rounding dropped stays behind. Or takes it all back, if it is not sent."""
        residual = self.bucket.residual
        if not sent:
            taken.undo()
            return
        if isinstance(taken, WholeTaken):
            taken.rest = self._dropped
        elif isinstance(taken, SelectedTaken) and residual is not None and self._config.values != ValueCodec.FP32:
            kernels.scatter_add(residual, taken.indices, self._dropped)
        taken.commit()
        self.bucket.age += 1

    def first(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the payload of the shard's first values, in the arena."""
        return self._payload((self._everything(), values), ValueCodec.FP32, 0, False)[0]

    def _payload(
        self, selected: Selected, codec: ValueCodec, clock: int, nonfinite: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rank, world = self._sender
        return encode(
            PUSH,
            self.spec,
            selected,
            codec,
            self._arena,
            rank=rank,
            world=world,
            step=clock,
            nonfinite=nonfinite,
            index_codec=self._config.indices,
        )

    def _everything(self) -> torch.Tensor:
        if self._all is None:
            self._all = everything(self.spec.numel)
        return self._all
