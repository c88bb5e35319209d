"""One batch of buckets on its way: prepared, submitted to the engine, and finished or failed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch

from sparsecomm.collectives import dense_ring_bytes
from sparsecomm.ddp.choice import MethodChoice
from sparsecomm.ddp.convergence import ConvergenceAlarm
from sparsecomm.ddp.fusion import Batch
from sparsecomm.ddp.hints import Hints
from sparsecomm.ddp.lanes import Lanes
from sparsecomm.ddp.memory import Memories
from sparsecomm.ddp.model import Averaging, ModelLookup, WrappedModel, Wrappers
from sparsecomm.ddp.native import NativeSum, NativeSums
from sparsecomm.ddp.scaling import LossScaling
from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.exchange import Plan, blank_header, report_failure
from sparsecomm.exchange.agree import agree
from sparsecomm.exchange.auto import NATIVE, Candidate
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import BucketMemory, Clipping
from sparsecomm.launch import World
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport, Metrics, Recorder
from sparsecomm.runtime.shards import local_part
from sparsecomm.transport import Channel, CollectiveSteps, Outside, Task
from sparsecomm.types import GRAD_DTYPES
from sparsecomm.wire import HEADER_BYTES, write_header

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
        native: sums that torch.distributed has in flight.
    """

    lookup: ModelLookup
    memories: Memories
    choice: MethodChoice
    scaling: LossScaling
    lanes: Lanes
    recorder: Recorder
    hints: Hints
    alarm: ConvergenceAlarm
    native: NativeSums


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
        self._ranks: tuple[int, ...] | None = None  # world ranks that average; None for all
        self._began = 0.0
        self._native = False  # whether the process group sums the batch; the same on all ranks
        self._outside: Outside | None = None

    def start(self) -> None:
        """Prepares the batch and submits it; returns at once. Collective, in the same order on all ranks.

        If this rank cannot prepare the batch, it submits its error instead, which fails the batch on all ranks.

        Raises:
            TransportError: if the engine takes no submissions.
        """
        parts, batch = self._parts, self._batch
        parts.recorder.submitted(self._step, last=batch.last)
        try:
            parts.choice.native.begin(self._step, self._owner.config)
            wrappers, averaging = self._look_up()
            self._ranks = averaging.ranks
            if batch.device.type != "cuda":  # on a GPU "auto" goes by bytes, without measuring
                parts.choice.begin(self._owner.config, self._here, averaging, self._step, last=batch.last)
        except Exception as error:
            # A failed look-up leaves nobody to tell; a failed measurement has failed on all ranks.
            self.fail(error)
        else:
            self._start_exchange(wrappers)
        if batch.last and parts.choice.native.active:
            parts.native.step_handed_over()

    def _start_exchange(self, wrappers: Wrappers | None) -> None:
        """Prepares the batch and submits it, or has the process group sum it. Wrappers are given if looked up anew."""
        parts = self._parts
        try:
            model = parts.lookup.attach(self._owner, self._here, wrappers)
            model.check_join()
            bucket, plan = self._prepare(model)
            with torch.no_grad():  # `allreduce_gradients` may be called with gradients that require one
                vector = self._flat(self._lane.workspace) if self._native else None
        except Exception as error:
            self._take_part_without(error)
        else:
            if vector is not None:
                self._start_native(model, vector)
            else:
                self._submit(bucket, plan)

    def _look_up(self) -> tuple[Wrappers | None, Averaging]:
        """Returns the wrappers if they had to be looked up, and the ranks that average."""
        parts, batch = self._parts, self._batch
        same = parts.memories.is_same(batch)
        self._native = parts.choice.native.active and bool(same) and batch.numel > 0
        if parts.lookup.must_look(self._step, changed=same is False):
            wrappers = parts.lookup.find(self._owner, self._here)
            return wrappers, wrappers.averaging
        model = parts.lookup.model
        assert model is not None, "otherwise it must be looked up"
        return None, model.averaging

    def _prepare(self, model: WrappedModel) -> tuple[BucketMemory, Plan]:
        """Checks the gradients and plans the exchange. Mutates the state's memories."""
        parts, batch, config = self._parts, self._batch, self._owner.config
        parts.memories.match_loaded(model.shapes)
        prefix = f"rank {model.rank}, bucket {batch.index}"
        batch.check(prefix)
        self._check_sharded(model)
        bucket = parts.memories.bucket(batch, model, prefix)
        k = config.compressor.k_for(batch.numel, self._step)
        how = self._choose(bucket, model, k)
        if self._native and how != NATIVE:
            parts.choice.native.leave(self._step)
            how = NATIVE
        if how == NATIVE and batch.device.type not in model.averaging.devices:
            raise ConfigError(f"{prefix}: collective='native', but the process group has no backend for {batch.device}")
        parts.memories.equip(bucket, config, how.method, self._step, self._lane.home(how.method))
        if parts.hints.due:
            sparse = not how.is_dense and k < batch.numel and parts.choice.is_settled()
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
            clipping=self._clipping(bucket, model),
            inner_group=config.inner_group,
            final=not (scaled and parts.scaling.may_skip()),
        )

    def _check_sharded(self, model: WrappedModel) -> None:
        """Checks that no option needs all shards of a model, where this rank has one.

        Raises:
            ConfigError: for a GradScaler or a norm to clip to.
        """
        if model.place.shards == 1:
            return
        where = f"rank {model.rank} holds {model.place} of the model"
        if self._parts.scaling.scaler is not None:
            raise ConfigError(
                f"{where}: scaler= is not supported, since an overflow in another shard would skip the step unseen; "
                "use bfloat16, which needs no scaler"
            )
        norm = getattr(self._owner.config.feedback, "clip_norm", None)
        if norm is not None:
            raise ConfigError(f"{where}: clipping to a norm ({norm}) is not supported, since no rank knows all of it")

    def _choose(self, bucket: BucketMemory, model: WrappedModel, k: int) -> Candidate:
        """Returns the method that exchanges the batch, of which k elements would be selected."""
        staged = self._batch.device.type == "cuda" and "cuda" in model.averaging.devices
        return self._parts.choice.choose(self._owner.config, bucket, k, self._step, model.size, staged=staged)

    def _clipping(self, bucket: BucketMemory, model: WrappedModel) -> Clipping | None:
        """Returns how this rank clips the gradient of a bucket, as `MomentumCorrection` explains it."""
        feedback, known = self._owner.config.feedback, bucket.alignment
        norm: float | None = getattr(feedback, "clip_norm", None)
        if norm is None:
            return None
        if not getattr(feedback, "aligned", False) or model.size == 1:
            return Clipping(norm * math.sqrt(bucket.layout.numel / max(model.numel, 1) / model.size))
        share = self._parts.memories.share_of_norm(bucket, model, self._step)
        alignment = known.of_gradients()  # 1 before the first measurement
        usual = bucket.layout.numel * known.gradient.each
        return Clipping(norm * math.sqrt(share / alignment), usual, own=alignment)

    # --- to the process group -----------------------------------------------------------------------------------

    def _start_native(self, model: WrappedModel, vector: torch.Tensor, error: Exception | None = None) -> None:
        """Has the process group sum the batch; with an error, in place of this rank's gradients."""
        self._vector, self._began = vector, perf_counter()
        engine = self._here.engine
        # The process group has the same timeout, but cannot tell who is late.
        deadline = time.monotonic() + engine.timeout - min(2.0, 0.3 * engine.timeout)
        self._outside = Outside(self._label, self._ranks, self.fail, deadline)
        engine.watch(self._outside)
        one = NativeSum(self._batch.index, vector, self, error)
        try:
            with torch.no_grad():
                self._parts.native.start(one, model.averaging.group, model.size)
        except Exception as failure:
            if self.release():
                self.fail(failure)

    def _take_part_without(self, error: Exception) -> None:
        """Takes part in what the other ranks do with the batch, so that all of them learn of this rank's error."""
        model, parameters = self._parts.lookup.model, self._batch.parameters
        if not self._native or model is None:
            self._tell(error, lambda: self._batch.finish(None), self.fail, lane=0)
            return
        like, n = self._batch.members[0].grad, sum(local_part(p).numel() for p in parameters)
        dtype = like.dtype if like.dtype in GRAD_DTYPES else parameters[0].dtype
        self._start_native(model, torch.full((n,), math.nan, dtype=dtype, device=like.device), error)

    # --- to the engine ------------------------------------------------------------------------------------------

    def _submit(self, bucket: BucketMemory, plan: Plan) -> None:
        """Submits the exchange."""
        ready = self._lane.side.mark()  # covers the gradient and the preparation of the bucket's memory

        def run(channel: Channel) -> CollectiveSteps[BucketReport]:
            steps = self._lane.steps(channel, bucket, self._flat, plan)
            return self._lane.side.drive(steps, ready)

        def done(report: BucketReport) -> None:
            self._finish(report, Candidate(plan.collective, plan.value_codec))

        self._here.engine.submit(
            Task(
                self._label,
                run,
                self._lane.in_order(done),
                self._lane.in_order(self.fail),
                group=self._ranks,
                key=self._key,
                patient=self._batch.is_small and not self._batch.last,
            )
        )

    def compare_notes(
        self, error: BaseException | None, done: Callable[[], None], fail: Callable[[BaseException], None]
    ) -> None:
        """Tells all ranks of this rank's error, if any; then calls `fail` if some rank has one, else `done`."""
        # Sums of several states may end in another order on other ranks, so each has a lane, by what it sums.
        lane = 1 + self._parts.memories.known[self._batch.index].bucket.layout.hash % 2**31
        try:
            self._tell(error, done, fail, lane=lane)
        except TransportError as closed:  # the engine is closed, and the thread that waits must learn of it
            fail(closed)

    def _tell(
        self,
        error: BaseException | None,
        done: Callable[[], None],
        fail: Callable[[BaseException], None],
        *,
        lane: int,
    ) -> None:
        """Submits an exchange in which ranks tell each other of errors. Calls `fail` if some rank has one."""
        batch, step, arena = self._batch, self._step, self._lane.arena

        def tell(channel: Channel) -> CollectiveSteps[None]:
            number = method_named(NATIVE.method).number  # where others are in an exchange, they read the error alone
            header = blank_header(channel.rank, channel.size, batch.index, step, batch.numel, number)
            if error is not None:
                yield from report_failure(channel, header, error, arena)
            payload = arena.get((batch.index, "failure"), HEADER_BYTES, torch.uint8)
            write_header(header, payload)
            yield from agree(channel, header, payload, arena, batch.index)

        self._here.engine.submit(
            Task(self._label, tell, lambda _: done(), fail, group=self._ranks, key=self._key, lane=lane)
        )

    # --- on the engine's thread ---------------------------------------------------------------------------------

    def _flat(self, arena: Arena) -> torch.Tensor:
        """Returns the vector to exchange, and keeps it until the batch is finished."""
        self._vector = self._batch.flat(arena)
        return self._vector

    def release(self) -> bool:
        """Ends the engine's watch on the sum. Returns False if the engine has failed the batch meanwhile."""
        return self._outside is not None and self._here.engine.release(self._outside)

    def finish_native(self) -> None:
        """Completes the futures of a batch that the process group has summed. Its bytes are those of a ring."""
        model, n = self._parts.lookup.model, self._batch.numel
        sent = dense_ring_bytes(n, 1 if model is None else model.size)
        report = BucketReport(self._batch.index, self._step, n, n, sent, sent, sent)
        report.wait_seconds = perf_counter() - self._began
        self._finish(report, NATIVE)

    def _finish(self, report: BucketReport, how: Candidate) -> None:
        """Notes the report and completes the futures, even if noting it fails."""
        try:
            self._parts.choice.finished(report, how)
            self._parts.recorder.finished(report, close=self._close_step)
        finally:
            self._batch.finish(self._vector)

    def _close_step(self, step: Metrics) -> None:
        """Makes the finished step final, or undoes all of it if the GradScaler is going to skip it."""
        parts, model = self._parts, self._parts.lookup.model
        parts.memories.finish_step(skipped=step.skipped > 0)
        parts.choice.native.closed(self._step, nothing_waits=parts.memories.nothing_waits(self._step))
        if self._step >= parts.alarm.due and model is not None and model.rank == 0:
            density = self._owner.config.compressor.density_at(self._step)
            parts.alarm.check(self._step, density, parts.memories.convergence)

    def fail(self, error: BaseException) -> None:
        """Fails the futures. Called on the starting thread if nothing could be submitted."""
        self._owner.last_error = error
        self._parts.choice.native.leave(self._step)
        self._parts.recorder.abandon(self._step)
        self._batch.fail(error)
