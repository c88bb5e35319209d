"""What a state keeps of a model's gradients: residuals and moments by parameter name, and buckets as last presented."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecomm.compress.base import SelectorMemory
from sparsecomm.ddp.checkpoint import Checkpoint, fill_names
from sparsecomm.ddp.model import WrappedModel
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import AdamCorrection, BucketLayout, BucketMemory, Feedback, ResidualStore
from sparsecomm.types import ValueCodec

__all__ = ["Memories"]


@dataclass(slots=True)
class _Known:
    """A bucket as DDP last presented it."""

    parameters: tuple[int, ...]
    bucket: BucketMemory


class Memories:
    """Residuals and moments by parameter name, and the buckets that DDP last presented.

    Attributes:
        known: buckets by number, as last presented.
    """

    def __init__(self) -> None:
        self.known: dict[int, _Known] = {}
        self._stores = {kind: ResidualStore(kind) for kind in ("residual", "velocity", "second_moment")}
        self._moments_since = 0  # step at which the moments of Adam correction were zero
        self._selectors: dict[int, SelectorMemory] = {}

    def knows_other(self, index: int, ids: tuple[int, ...]) -> bool:
        """Returns whether the bucket of that number last had other parameters."""
        known = self.known.get(index)
        return known is not None and known.parameters != ids

    def bucket(
        self, index: int, parameters: Sequence[torch.Tensor], numel: int, model: WrappedModel, where: str
    ) -> BucketMemory:
        """Returns what is known of a bucket; if DDP has rebuilt its buckets, residuals move by name.

        Raises:
            ConfigError: for a parameter that is not the model's or a bucket of another size than its parameters.
        """
        ids = tuple(id(p) for p in parameters)
        known = self.known.get(index)
        if known is not None and known.parameters == ids and known.bucket.layout.numel == numel:
            return known.bucket
        layout = BucketLayout.of([(model.name_of(p, where), p) for p in parameters])
        if layout.numel != numel:
            raise ConfigError(f"{where}: {numel} elements, but its {len(ids)} parameters have {layout.numel}")
        bucket = BucketMemory(index, layout, memory=self._selectors.pop(layout.hash, SelectorMemory()))
        self.known[index] = _Known(ids, bucket)
        return bucket

    def equip(self, bucket: BucketMemory, config: SparseConfig, collective: str, step: int, home: torch.device) -> None:
        """Gives a bucket the memory that an exchange needs, on the device where it works. Mutates it."""
        moments, residuals = _moments(config.feedback), self._stores["residual"]
        rounds = config.dense_values != ValueCodec.FP32 and config.feedback is not None
        if method_named(collective).needs_residual or moments or rounds or residuals.has(bucket.layout):
            bucket.residual = residuals.bucket(bucket.layout, home)
        for kind in ("velocity", "second_moment"):
            setattr(bucket, kind, self._stores[kind].bucket(bucket.layout, home) if kind in moments else None)
        bucket.age = step - self._moments_since + 1

    def settle(self, *, skipped: bool) -> None:
        """Makes the last exchanged step of all buckets final, or takes it back if the optimizer skips it."""
        for known in self.known.values():
            known.bucket.finish_step(skipped=skipped)

    def change(self, feedback: Feedback | None, step: int) -> None:
        """Forgets what fits the options of before: thresholds, what collectives remember, moments no longer kept."""
        for known in self.known.values():
            known.bucket.memory = SelectorMemory()
            known.bucket.shared = None
        self._selectors.clear()
        for kind in set(self._stores) - {"residual", *_moments(feedback)}:
            self._stores[kind] = ResidualStore(kind)
        if not self._stores["second_moment"].names():
            self._moments_since = step

    def residual_norm(self) -> float:
        """Returns the 2-norm of all residuals. Reads all of them."""
        return math.sqrt(sum(float(t.square().sum(dtype=torch.float64)) for t in self._stores["residual"].slices()))

    def save(self, step: int, model: WrappedModel, config: SparseConfig) -> Checkpoint:
        """Returns what a checkpoint of this rank holds."""
        made = Checkpoint(step, model.rank, model.size)
        feedback = config.feedback
        # Named in full from the first step on, so that torch.distributed.checkpoint, which fills what it is handed,
        # loads into a fresh state.
        kept = model.trainable if feedback is not None and not config.compressor.is_dense else set()
        for kind, named in made.memories.items():
            if kind == "residual" or kind in _moments(feedback):
                named.update(self._stores[kind].state() if feedback is not None else {})
                fill_names(named, model.shapes, kept)
        if isinstance(feedback, AdamCorrection):
            made.moment_steps = step - self._moments_since
        made.selectors = dict(self._selectors)
        for known in self.known.values():
            if known.bucket.memory.k:
                made.selectors[known.bucket.layout.hash] = known.bucket.memory
        return made

    def load(self, loaded: Checkpoint) -> None:
        """Takes over a checkpoint that has been checked."""
        for kind, store in self._stores.items():
            store.load(loaded.memories[kind])
        self.known.clear()
        self._selectors = loaded.selectors
        self._moments_since = loaded.step - loaded.moment_steps


def _moments(feedback: Feedback | None) -> tuple[str, ...]:
    """Returns the kinds of memory that a feedback keeps beside the residual."""
    return () if feedback is None else feedback.memories
