"""The choice of a method for each bucket: as configured, measured by `collective="auto"`, or by fewest bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsecomm.ddp.model import Averaging
from sparsecomm.exchange.auto import NATIVE, Candidate, Chooser
from sparsecomm.exchange.auto.rule import choose_collective
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import BucketMemory, ErrorFeedback
from sparsecomm.launch import World
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import Sizes

__all__ = ["MethodChoice", "NativeSteps", "sums_gradients"]


def sums_gradients(config: SparseConfig) -> bool:
    """Returns whether a dense exchange sums gradients, as a process group can, and not finished updates."""
    return config.feedback is None or isinstance(config.feedback, ErrorFeedback)


class NativeSteps:
    """The steps of one state that are left to torch.distributed (native.py), all of their buckets.

    All ranks must decide alike without a message. They do: a step is native if in the step before all buckets were
    exchanged by the method "native", whose headers have told all ranks that nothing waits on any of them, and nothing
    has happened since: no failure, no change of options, no checkpoint. If another method is chosen meanwhile, it is
    used from the next step on.

    Attributes:
        active: whether this step is native. Changed by the submitting thread alone.
    """

    def __init__(self) -> None:
        self.active = False
        self._ready = False  # whether all ranks know that nothing waits
        self._step = -1  # that was decided on last
        self._left = -1  # step after which another method is to be used, or that has failed

    def begin(self, step: int, config: SparseConfig) -> None:
        """Decides on a step at its first batch; does nothing at others."""
        if step != self._step:
            self._step, self.active = step, self._ready and sums_gradients(config)

    def reset(self) -> None:
        """Ends native steps: options or residuals are changing. Call it alike on all ranks."""
        self._ready = self.active = False
        self._step = -1

    def leave(self, step: int) -> None:
        """Ends native steps after this one: another method was chosen, or an exchange has failed."""
        self._left, self._ready = max(self._left, step), False

    def closed(self, step: int, *, nothing_waits: bool) -> None:
        """Notes the end of a step's last exchange, and whether all ranks know that nothing waits on any of them."""
        self._ready = nothing_waits and step > self._left


class MethodChoice:
    """Chooses the methods of one state. It measures only where `collective="auto"` leaves a choice.

    Attributes:
        native: which steps are left to torch.distributed.
    """

    def __init__(self) -> None:
        self.native = NativeSteps()
        self._chooser: Chooser | None = None  # made once the world size is known

    def reset(self) -> None:
        """Forgets all measurements, because the options or the step have changed."""
        self._chooser = None
        self.native.reset()

    def begin(self, config: SparseConfig, here: World, averaging: Averaging, step: int, *, last: bool) -> None:
        """Advances the measurements at the hand-over of a bucket. Collective in steps that measure or decide.

        Args:
            config: options of the state.
            here: this process.
            averaging: the ranks that average.
            step: training step.
            last: whether the bucket is the last of its step.

        Raises:
            SparseCommError: on every rank, if an exchange of measurements failed.
        """
        ranks = averaging.ranks
        size = here.size if ranks is None else len(ranks)
        if config.method is not None or config.compressor.is_dense or size == 1 or step < config.dense_steps:
            return
        if self._chooser is None or self._chooser.size != size:
            self._chooser = Chooser(config, size, native="cpu" in averaging.devices and sums_gradients(config))

        def call(label: str, make: Callable[[Channel], CollectiveSteps[Any]]) -> Any:
            return here.engine.call(label, make, group=ranks)

        self._chooser.begin(step, call)
        if last:
            self._chooser.handed_over()

    def choose(
        self, config: SparseConfig, bucket: BucketMemory, k: int, step: int, size: int, *, staged: bool
    ) -> Candidate:
        """Returns the method and the value codec that exchange a bucket.

        Args:
            config: options of the state.
            bucket: memory of the bucket.
            k: elements to select.
            step: training step.
            size: number of ranks.
            staged: whether the bucket is on a GPU whose process group can sum it there. A dense sum of this package
                would go through the host.
        """
        numel = bucket.layout.numel
        if config.method == NATIVE.method:
            return NATIVE
        by_group = staged and config.method is None and sums_gradients(config)
        dense = NATIVE if by_group else Candidate("dense", config.dense_values)
        if config.compressor.is_dense or step < config.dense_steps or numel < config.dense_below:
            return dense
        if self._chooser is not None:
            return self._chooser.choose(bucket.index, numel, k)
        method = config.method
        if method is None:  # "auto" on a GPU goes by bytes; a single rank sends nothing
            sizes = Sizes(k, numel, size, config.values, config.indices)
            method = choose_collective(sizes, dense_codec=config.dense_values)
        return Candidate(method, config.values) if method_named(method).compresses else dense

    def finished(self, report: BucketReport, candidate: Candidate) -> None:
        """Notes the duration of an exchange. Called on the engine's thread."""
        chooser = self._chooser  # read once: a change of options on another thread may forget it meanwhile
        if chooser is not None:
            seconds = report.select_seconds + report.encode_seconds + report.wait_seconds + report.apply_seconds
            chooser.finished(report.bucket, candidate, seconds)

    def explain(self, config: SparseConfig) -> str:
        """Returns a table of predictions, measurements and choices, or the reason why there is none."""
        only = config.compressor.collectives
        if self._chooser is not None:
            return self._chooser.explain()
        if config.collective != "auto":
            return f"collective={config.collective!r} was given: nothing is chosen"
        if only:
            return f"{type(config.compressor).__name__} needs collective={only[0]!r}: nothing is chosen"
        return "nothing is chosen: there was no exchange among more than one rank yet"

    def is_settled(self) -> bool:
        """Returns whether nothing is being tried: the choice was made, or there is none to make."""
        return self._chooser is None or self._chooser.decided_at is not None
