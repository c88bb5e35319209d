"""One shard of a worker's gradient: its error feedback, and the payloads that carry it to the server."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparsecomm import kernels
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import (
    BucketLayout,
    BucketMemory,
    Clipping,
    Incoming,
    SelectedTaken,
    Taken,
    WholeTaken,
    take_all,
    take_some,
)
from sparsecomm.ps.protocol.payloads import PUSH, Origin, all_positions, encode
from sparsecomm.ps.protocol.sharding import ShardSpec
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Codecs, Pairs, ValueCodec

__all__ = ["Part"]


class Part:
    """One shard of a worker's gradient.

    A push is `take`, then `encode`, then `commit`; `Taken.undo` in place of `commit` puts everything back.

    Args:
        spec: The shard.
        config: Options of compression.
        sender: Rank of the worker, and number of ranks.
        clip: Square of the share of `clip_norm` that this part of the gradient gets.
        arena: Gives the buffers.

    Attributes:
        version: Version pulled last; -1 before the first pull.
        bucket: Residual and moments of the shard.
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
            residual=None if lossless and not memories else torch.zeros(n, dtype=torch.float32),
            velocity=torch.zeros(n, dtype=torch.float32) if "velocity" in memories else None,
            second_moment=torch.zeros(n, dtype=torch.float32) if "second_moment" in memories else None,
        )
        self._config = config
        self._sender = sender
        self._arena = arena
        self._clipping = None if limit is None else Clipping(float(limit) * math.sqrt(clip))
        self._all: torch.Tensor | None = None
        self._rounding = torch.empty(0, dtype=torch.float32)

    def take(self, grad: torch.Tensor, clock: int, absent: Sequence[int] = ()) -> Taken:
        """Adds a gradient to the residual and takes out the values to send. `commit` or `Taken.undo` must follow.

        Args:
            grad: float32, shape (spec.numel,). Must not change until then.
            clock: Pushes done before.
            absent: Numbers of the pieces without a gradient. `grad` is zero there. Their residual and moments stay as
                they are, since the server leaves such a piece alone.
        """
        config, n = self._config, self.spec.numel
        pieces = [self.spec.pieces[number] for number in absent]
        unused = tuple((p.offset, p.offset + p.end - p.start) for p in pieces)
        incoming = Incoming(grad, config.feedback, unused=unused, clipping=self._clipping)
        if config.compressor.is_dense or clock < config.dense_steps or n < config.dense_below:
            taken = take_all(self.bucket, incoming, self._arena)
            if self.bucket.residual is None and not bool(torch.isfinite(grad).all()):
                taken.added.nonfinite += 1
            return taken
        return take_some(self.bucket, incoming, config.compressor, config.compressor.k_for(n, clock), self._arena)

    def encode(self, taken: Taken, clock: int) -> tuple[torch.Tensor, int]:
        """Returns the payload of the values taken, in the arena, and its number of nonzeros.

        Args:
            taken: Result of `take`.
            clock: Pushes done before.
        """
        residual, codec = self.bucket.residual, self._config.values
        if isinstance(taken, SelectedTaken):
            pairs: Pairs = (taken.indices, taken.values)
        else:
            codec = self._config.dense_values
            pairs = (self._positions(), taken.added.incoming.grad if residual is None else residual)
        payload, self._rounding = self._payload(pairs, codec, clock)
        return payload, pairs[1].numel()

    def encode_nonfinite(self, clock: int) -> torch.Tensor:
        """Returns the payload of a push whose gradient is not finite: without values, in the arena."""
        nothing = torch.empty(0, dtype=torch.uint32), torch.empty(0, dtype=torch.float32)
        return self._payload(nothing, self._config.values, clock, nonfinite=True)[0]

    def encode_first(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the payload of the shard's first values, in the arena."""
        return self._payload((self._positions(), values), ValueCodec.FP32, 0)[0]

    def commit(self, taken: Taken) -> None:
        """Makes a push final after `encode`: rounding errors go to the residual."""
        residual = self.bucket.residual
        if isinstance(taken, WholeTaken):
            taken.rest = self._rounding
        elif isinstance(taken, SelectedTaken) and residual is not None and self._config.values != ValueCodec.FP32:
            kernels.scatter_add(residual, taken.indices, self._rounding)
        taken.commit()
        self.bucket.age += 1

    def _payload(
        self, pairs: Pairs, codec: ValueCodec, clock: int, *, nonfinite: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        origin = Origin(PUSH, self.spec, *self._sender, step=clock)
        return encode(origin, pairs, Codecs(codec, self._config.indices), self._arena, nonfinite=nonfinite)

    def _positions(self) -> torch.Tensor:
        if self._all is None:
            self._all = all_positions(self.spec.numel)
        return self._all
