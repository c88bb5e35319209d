"""The memories of a state: residuals and moments by parameter name, and the bucket memories that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsecomm.compress.base import SelectorMemory
from sparsecomm.ddp.checkpoint import Checkpoint, fill_names
from sparsecomm.ddp.convergence import Convergence, combine
from sparsecomm.ddp.fusion import Batch
from sparsecomm.ddp.gradients import check_real
from sparsecomm.ddp.matching import matched
from sparsecomm.ddp.model import WrappedModel
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import (
    AdamCorrection,
    Alignment,
    BucketLayout,
    BucketMemory,
    Empty,
    Feedback,
    ResidualStore,
    Watch,
)
from sparsecomm.runtime.kinds import check_plain
from sparsecomm.runtime.shards import local_part
from sparsecomm.types import ValueCodec

__all__ = ["Memories", "Waiting"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What this rank holds back of one parameter.

    Attributes:
        parameter: the parameter.
        residual: float32, in the parameter's shape; a view of the bucket's residual.
        alignment: how far the ranks' residuals agree in the bucket, in [1/P, 1].
    """

    parameter: torch.Tensor
    residual: torch.Tensor
    alignment: float


@dataclass(slots=True)
class _Known:
    """A bucket as it was last handed over.

    Attributes:
        parameters: ids of its parameters.
        bucket: its memory.
        equipped: what that memory was equipped for: options, collective, device, and version of the stores; None for
            nothing.
        step: step in which it was last handed over.
    """

    parameters: tuple[int, ...]
    bucket: BucketMemory
    equipped: tuple[SparseConfig, str, torch.device, int] | None = None
    step: int = -1

    @property
    def is_dense(self) -> bool:
        """Whether its last exchange was dense; in 16 bits that leaves a residual too, but only of rounding."""
        return self.equipped is not None and not method_named(self.equipped[1]).compresses


class Memories:
    """Residuals and moments by parameter name, and the memory of each bucket.

    Attributes:
        known: buckets by number, as they were last handed over.
    """

    def __init__(self) -> None:
        self.known: dict[int, _Known] = {}
        self._stores = {kind: ResidualStore(kind) for kind in ("residual", "velocity", "second_moment")}
        self._moments_since = 0  # step at which the moments of Adam correction were zero
        self._selectors: dict[int, SelectorMemory] = {}
        self._alignments: dict[str, Alignment] = {}  # of each parameter's bucket
        self._square: tuple[int, float] = (-1, 0.0)  # a step, and the average gradient's expected squared norm in it
        self._unmatched: tuple[Checkpoint, bool] | None = None  # loaded before the model was known; whether strictly

    def is_same(self, batch: Batch) -> bool | None:
        """Returns whether the bucket of that number had these parameters when last handed over; None if never."""
        known = self.known.get(batch.index)
        return None if known is None else known.parameters == batch.ids

    def bucket(self, batch: Batch, model: WrappedModel, prefix: str) -> BucketMemory:
        """Returns the memory of a bucket. After a rebuild of DDP's buckets, residuals move to theirs by name.

        Args:
            batch: the bucket, or several that are exchanged as one.
            model: gives the parameters' names.
            prefix: start of every error's text.

        Raises:
            ConfigError: if a parameter is complex, not in the model or no plain tensor, or the bucket's size is not
                that of its parameters.
        """
        index, numel = batch.index, batch.numel
        known = self.known.get(index)
        if known is not None and known.parameters == batch.ids and known.bucket.layout.numel == numel:
            return known.bucket
        check_real(batch.parameters, prefix)
        named = [(model.name_of(p, prefix), local_part(p)) for p in batch.parameters]
        for name, p in named:
            check_plain(p, f"{prefix}: parameter {name!r}")
        layout = BucketLayout.of(named)
        if layout.numel != numel:
            raise ConfigError(f"{prefix}: {numel} elements, but its {len(named)} parameters have {layout.numel}")
        selector = self._selectors.pop(layout.hash, SelectorMemory())
        bucket = BucketMemory(index, layout, selector=selector, watch=Watch(layout))
        before = zip(layout.shapes, map(self._alignments.get, layout.names), strict=True)
        bucket.alignment = Alignment.merged([(math.prod(shape), a) for shape, a in before if a is not None])
        self._alignments |= dict.fromkeys(layout.names, bucket.alignment)
        self.known[index] = _Known(batch.ids, bucket)
        return bucket

    def equip(self, bucket: BucketMemory, config: SparseConfig, collective: str, step: int, home: torch.device) -> None:
        """Gives a bucket the residual and the moments that its next exchange needs.

        Args:
            bucket: Mutated.
            config: options of the state.
            collective: the collective that exchanges the bucket.
            step: training step.
            home: device of the memory.
        """
        bucket.age = step - self._moments_since + 1
        known, version = self.known[bucket.index], sum(store.version for store in self._stores.values())
        known.step = step
        if known.equipped is not None:
            options, *basis = known.equipped
            if options is config and basis == [collective, home, version]:
                return
        moments, residuals = _moments(config.feedback), self._stores["residual"]
        rounds = config.dense_values != ValueCodec.FP32 and config.feedback is not None
        if method_named(collective).needs_residual or moments or rounds or residuals.has(bucket.layout):
            residual = residuals.bucket(bucket.layout, home)
            if residual is not bucket.residual:
                bucket.residual, bucket.empty = residual, Empty.UNKNOWN
        for kind in ("velocity", "second_moment"):
            setattr(bucket, kind, self._stores[kind].bucket(bucket.layout, home) if kind in moments else None)
        version = sum(store.version for store in self._stores.values())
        known.equipped = (config, collective, home, version)

    def nothing_waits(self, step: int) -> bool:
        """Returns whether all ranks know that nothing waits on any of them, in all buckets exchanged in a step."""
        return all(known.bucket.empty is Empty.EVERYWHERE for known in self.known.values() if known.step == step)

    def finish_step(self, *, skipped: bool) -> None:
        """Makes the last exchanged step of all buckets final, or undoes it if the optimizer skips it."""
        for known in self.known.values():
            if known.bucket.pending is not None:
                known.bucket.finish_step(skipped=skipped)

    def change(self, feedback: Feedback | None, step: int) -> None:
        """Forgets everything that depends on the options before a change.

        These are thresholds, the methods' memories of buckets, and moments that the new feedback does not keep.
        Residuals stay.

        Args:
            feedback: the new feedback.
            step: training step.
        """
        for known in self.known.values():
            known.bucket.selector = SelectorMemory()
            known.bucket.shared = None
            known.equipped = None
        self._selectors.clear()
        for kind in set(self._stores) - {"residual", *_moments(feedback)}:
            self._stores[kind] = ResidualStore(kind)
        if not self._stores["second_moment"].names():
            self._moments_since = step

    def share_of_norm(self, bucket: BucketMemory, model: WrappedModel, step: int) -> float:
        """Returns the expected share of a bucket in the squared norm of the model's average gradient, in (0, 1].

        It is the mean of what was measured before this step and of the bucket's share of the elements, which keeps it
        above 0 where a sample missed all that is not zero. Without measurements of all buckets it is the latter alone.

        Args:
            bucket: memory of the bucket.
            model: the model.
            step: training step.
        """
        by_size = bucket.layout.numel / max(model.numel, 1)
        if self._square[0] != step:
            found = [(math.prod(model.shapes[name]), self._alignments.get(name)) for name in model.trainable]
            known = all(a is not None and a.count for _, a in found)
            # fsum: names are in a set, whose order differs between processes
            square = math.fsum(n * a.gradient.mean for n, a in found if a is not None) if known else 0.0
            self._square = (step, square)
        square = self._square[1]
        if not square > 0.0:
            return by_size
        return (by_size + min(1.0, bucket.layout.numel * bucket.alignment.gradient.mean / square)) / 2.0

    def waiting(self, parameters: Sequence[torch.Tensor], names: Mapping[int, str]) -> list[Waiting]:
        """Returns what is held back of these parameters; none of a parameter without a residual.

        Args:
            parameters: parameters of the model.
            names: their names, by `id(parameter)`.
        """
        residuals, found = self._stores["residual"].views(), []
        for p in parameters:
            name = names.get(id(p), "")
            if name in residuals:
                alignment = self._alignments.get(name)
                found.append(Waiting(p, residuals[name], 1.0 if alignment is None else alignment.of_residuals()))
        return found

    def delivered(self, step: int) -> dict[int, tuple[int, float]]:
        """Returns one element of the average of some buckets: its place in its parameter, and its value.

        Args:
            step: step of the average.

        Returns:
            By `id(parameter)`; the place counts elements in the parameter's memory order.
        """
        found = {}
        for known in self.known.values():
            if known.bucket.delivered is not None and known.bucket.delivered[0] == step:
                _, position, value = known.bucket.delivered
                i, place = known.bucket.layout.find(position)
                found[known.parameters[i]] = (place, value)
        return found

    def residual_norm(self) -> float:
        """Returns the 2-norm of all residuals together. Reads every element."""
        norms = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in self._stores["residual"].slices())
        return math.hypot(*norms)

    def convergence(self) -> Convergence | None:
        """Returns estimates over all buckets whose last exchange was compressed; None if there are none."""
        known = list(self.known.values())
        newest = max((k.step for k in known), default=0)
        # A rebuild of DDP's buckets may leave numbers behind that are not in use any more.
        used = [k for k in known if k.step >= newest - 1 and not k.is_dense]
        seen = [k.bucket.watch.seen() for k in used if k.bucket.watch is not None]
        return combine([s for s in seen if s is not None])

    def save(self, step: int, model: WrappedModel, config: SparseConfig) -> Checkpoint:
        """Returns the checkpoint of this rank.

        Raises:
            StateError: if what was loaded before the model was known is of another model.
        """
        if model.names:
            self.match_loaded(model.shapes)
        made = Checkpoint(step, model.rank, model.size, model.place)
        feedback = config.feedback
        # torch.distributed.checkpoint fills the tensors it is given. A new state must therefore name all parameters
        # before its first step, or it could not be loaded into.
        kept = model.trainable if feedback is not None and not config.compressor.is_dense else set()
        for kind, named in made.memories.items():
            if kind == "residual" or kind in _moments(feedback):
                named.update(self._stores[kind].state() if feedback is not None else {})
                fill_names(named, model.shapes, kept)
        if getattr(feedback, "aligned", False):
            made.alignments = {name: self._alignments.get(name, Alignment()) for name in model.trainable}
        if isinstance(feedback, AdamCorrection):
            made.moment_steps = step - self._moments_since
        made.selectors = dict(self._selectors)
        for known in self.known.values():
            if known.bucket.selector.k:
                made.selectors[known.bucket.layout.hash] = known.bucket.selector
        return made

    def load(self, loaded: Checkpoint, model: WrappedModel, *, strict: bool) -> None:
        """Replaces all memories by those of a checkpoint.

        Args:
            loaded: a checkpoint that passed `Checkpoint.check`.
            model: if its parameters are not known yet, `match_loaded` compares them later.
            strict: as for `matched`.

        Raises:
            StateError: if the checkpoint is of another model; nothing is changed then.
        """
        self._take(matched(loaded, model.shapes, strict=strict) if model.names else loaded)
        self._unmatched = None if model.names else (loaded, strict)

    def _take(self, loaded: Checkpoint) -> None:
        for kind, store in self._stores.items():
            store.check(loaded.memories[kind])
        for kind, store in self._stores.items():
            store.load(loaded.memories[kind])
        self.known.clear()
        self._square = (-1, 0.0)
        self._selectors, self._alignments = dict(loaded.selectors), dict(loaded.alignments)
        self._moments_since = loaded.step - loaded.moment_steps

    def match_loaded(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Matches a checkpoint that was loaded before the model was known; does nothing if there is none.

        Args:
            shapes: parameter shapes of the model, by name.

        Raises:
            StateError: if the checkpoint is of another model.
        """
        if self._unmatched is not None:
            loaded, strict = self._unmatched
            fitted = matched(loaded, shapes, strict=strict)
            if fitted is not loaded:
                self._take(fitted)
            self._unmatched = None


def _moments(feedback: Feedback | None) -> tuple[str, ...]:
    """Returns the kinds of memory that a feedback keeps in addition to the residual."""
    return () if feedback is None else feedback.memories
