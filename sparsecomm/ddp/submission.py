"""One batch of buckets on its way: prepared, submitted to the engine, and finished or failed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from sparsecomm.ddp.choice import MethodChoice
from sparsecomm.ddp.convergence import ConvergenceAlarm
from sparsecomm.ddp.fusion import Batch
from sparsecomm.ddp.hints import Hints
from sparsecomm.ddp.lanes import Lanes
from sparsecomm.ddp.memory import Memories
from sparsecomm.ddp.model import ModelLookup, WrappedModel, Wrappers
from sparsecomm.ddp.scaling import LossScaling
from sparsecomm.exchange import Plan, blank_header, report_failure
from sparsecomm.exchange.auto import Candidate
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import BucketMemory
from sparsecomm.launch import World
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport, Metrics, Recorder
from sparsecomm.transport import Channel, CollectiveSteps, Task

__all__ = ["StateParts", "Submission", "SubmittingState"]


class SubmittingState(Protocol):
    """The `SparseState` that submits, as far as a submission uses it.

    Attributes:
        config: options of the state.
        last_error: the latest failure. Set by submissions.
    """

    config: SparseConfig
    last_error: BaseException | None


@dataclass(frozen=True, slots=True)
class StateParts:
    """The parts of a state that all its submissions work with.

    Attributes:
        lookup: finds the wrapped model and the ranks that average.
        memories: residuals and moments.
        choice: chooses the method of each bucket.
        scaling: the GradScaler in use.
        lanes: buffers and order of work, by device.
        recorder: adds up reports.
        hints: looks at the optimizer, and at the end of the run.
        alarm: warns if compression may slow convergence.
    """

    lookup: ModelLookup
    memories: Memories
    choice: MethodChoice
    scaling: LossScaling
    lanes: Lanes
    recorder: Recorder
    hints: Hints
    alarm: ConvergenceAlarm


class Submission:
    """One batch on its way. `start` runs on the thread that hands buckets over; the engine's thread does the rest.

    Args:
        owner: the state.
        parts: the state's parts.
        batch: the buckets.
        step: training step.
        here: this process.
    """

    def __init__(self, owner: SubmittingState, parts: StateParts, batch: Batch, step: int, here: World) -> None:
        self._owner = owner
        self._parts = parts
        self._batch = batch
        self._step = step
        self._here = here
        self._lane = parts.lanes.of(batch.device)
        self._key = (id(owner), batch.index)
        self._label = f"bucket {batch.index} of step {step}"
        self._vector: torch.Tensor | None = None

    def start(self) -> None:
        """Prepares the batch and submits it; returns at once. Collective, in the same order on all ranks.

        If this rank cannot prepare the batch, it submits its error instead, which fails the batch on all ranks.

        Raises:
            TransportError: if the engine takes no submissions.
        """
        parts, batch = self._parts, self._batch
        parts.recorder.submitted(self._step, last=batch.last)
        try:
            wrappers, ranks = self._look_up()
            if batch.device.type != "cuda":  # on a GPU "auto" goes by bytes, without measuring
                parts.choice.begin(self._owner.config, self._here, ranks, self._step, last=batch.last)
        except Exception as error:
            # A failed look-up leaves nobody to tell; a failed measurement has failed on all ranks.
            self._fail(error)
            return
        try:
            model = parts.lookup.attach(self._owner, self._here, wrappers)
            model.check_join()
            bucket, plan = self._prepare(model)
        except Exception as error:
            self._submit_error(error, ranks)
            return
        self._submit(bucket, plan, model.ranks)

    def _look_up(self) -> tuple[Wrappers | None, tuple[int, ...] | None]:
        """Returns the wrappers if they had to be looked up, and the world ranks that average (None: all)."""
        parts, batch = self._parts, self._batch
        changed = parts.memories.has_changed(batch.index, tuple(id(p) for p in batch.parameters))
        if parts.lookup.must_look(self._step, changed=changed):
            wrappers = parts.lookup.find(self._owner, self._here)
            return wrappers, wrappers.ranks
        model = parts.lookup.model
        return None, None if model is None else model.ranks

    def _prepare(self, model: WrappedModel) -> tuple[BucketMemory, Plan]:
        """Checks the gradients and plans the exchange. Mutates the state's memories."""
        parts, batch, config = self._parts, self._batch, self._owner.config
        parts.memories.match_loaded(model.shapes)
        prefix = f"rank {model.rank}, bucket {batch.index}"
        batch.check(prefix)
        bucket = parts.memories.bucket(batch.index, batch.parameters, batch.numel, model, prefix)
        k = config.compressor.k_for(batch.numel, self._step)
        how = parts.choice.choose(config, batch.index, k, batch.numel, self._step, model.size)
        parts.memories.equip(bucket, config, how.method, self._step, self._lane.home(how.method))
        if parts.hints.due:
            sparse = how.method != "dense" and k < batch.numel and parts.choice.is_settled()
            parts.hints.at_bucket(model, sparse=sparse)
        scaled = parts.scaling.scaler is not None
        return bucket, Plan(
            step=self._step,
            collective=how.method,
            compressor=config.compressor,
            k=k,
            value_codec=how.values,
            index_codec=config.indices,
            feedback=config.feedback,
            grad_scale=parts.scaling.grad_scale() if scaled else 1.0,
            unused=batch.unused_spans(bucket.layout) if model.may_skip and bucket.residual is not None else (),
            clip_norm=self._clip_norm(bucket, model),
            inner_group=config.inner_group,
            final=not (scaled and parts.scaling.may_skip()),
        )

    def _clip_norm(self, bucket: BucketMemory, model: WrappedModel) -> float | None:
        """Returns the norm to which this rank clips the gradient of a bucket, as `MomentumCorrection` explains it."""
        feedback = self._owner.config.feedback
        norm: float | None = getattr(feedback, "clip_norm", None)
        if norm is None:
            return None
        if not getattr(feedback, "aligned", False) or model.size == 1:
            return norm * math.sqrt(bucket.layout.numel / max(model.numel, 1) / model.size)
        share = self._parts.memories.share_of_norm(bucket, model, self._step)
        return norm * math.sqrt(share / bucket.alignment.of_gradients())

    # --- to the engine ------------------------------------------------------------------------------------------

    def _submit(self, bucket: BucketMemory, plan: Plan, ranks: tuple[int, ...] | None) -> None:
        """Submits the exchange."""
        ready = self._lane.side.mark()  # covers the gradient and the preparation of the bucket's memory

        def run(channel: Channel) -> CollectiveSteps[BucketReport]:
            steps = self._lane.steps(channel, bucket, self._flat, plan)
            return self._lane.side.drive(steps, ready)

        def done(report: BucketReport) -> None:
            self._finish(report, plan)

        self._here.engine.submit(
            Task(
                self._label,
                run,
                self._lane.in_order(done),
                self._lane.in_order(self._fail),
                group=ranks,
                key=self._key,
                patient=self._batch.is_small and not self._batch.last,
            )
        )

    def _submit_error(self, cause: Exception, ranks: tuple[int, ...] | None) -> None:
        """Submits this rank's error in place of the exchange, so that every rank fails with it."""
        batch, step, arena = self._batch, self._step, self._lane.arena

        def tell(channel: Channel) -> CollectiveSteps[None]:
            number = method_named("dense").number  # the others read only the error flag
            header = blank_header(channel.rank, channel.size, batch.index, step, batch.numel, number)
            return report_failure(channel, header, cause, arena)

        self._here.engine.submit(
            Task(self._label, tell, lambda _: batch.finish(None), self._fail, group=ranks, key=self._key)
        )

    # --- on the engine's thread ---------------------------------------------------------------------------------

    def _flat(self, arena: Arena) -> torch.Tensor:
        """Returns the vector to exchange, and keeps it until the batch is finished."""
        self._vector = self._batch.flat(arena)
        return self._vector

    def _finish(self, report: BucketReport, plan: Plan) -> None:
        """Notes the report and completes the futures, even if noting it fails."""
        try:
            self._parts.choice.finished(report, Candidate(plan.collective, plan.value_codec))
            self._parts.recorder.finished(report, close=self._close_step)
        finally:
            self._batch.finish(self._vector)

    def _close_step(self, step: Metrics) -> None:
        """Makes the finished step final, or undoes all of it if the GradScaler is going to skip it."""
        parts, model = self._parts, self._parts.lookup.model
        parts.memories.finish_step(skipped=step.skipped > 0)
        if self._step >= parts.alarm.due and model is not None and model.rank == 0:
            density = self._owner.config.compressor.density_at(self._step)
            parts.alarm.check(self._step, density, parts.memories.convergence)

    def _fail(self, error: BaseException) -> None:
        """Fails the futures. Called on the starting thread if nothing could be submitted."""
        self._owner.last_error = error
        self._parts.recorder.abandon(self._step)
        self._batch.fail(error)
