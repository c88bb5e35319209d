"""What a sparse hook keeps from step to step: options, residuals by parameter name, counters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sparsecomm.compress import Compressor
from sparsecomm.ddp.checkpoint import Checkpoint
from sparsecomm.ddp.fusion import Batch, Fusion, Handed
from sparsecomm.ddp.lanes import Lanes
from sparsecomm.ddp.memory import Memories
from sparsecomm.ddp.model import WrappedModel, Wrappers, find_wrappers
from sparsecomm.ddp.unused import note_use, watch_use
from sparsecomm.errors import ConfigError, StateError
from sparsecomm.exchange import Plan, blank_header, report_failure
from sparsecomm.exchange.auto import Candidate, Chooser
from sparsecomm.exchange.auto.rule import choose_collective
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import BucketMemory
from sparsecomm.launch import World, world
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport, Metrics, Recorder, StepCallback
from sparsecomm.transport import Channel, CollectiveSteps, Task
from sparsecomm.wire import CollectiveKind

__all__ = ["SparseState"]


class SparseState:
    """State of `sparse_hook` for one DDP model.

    ```
    state = sc.SparseState(sc.TopK(density=0.01))
    ddp.register_comm_hook(state, sc.sparse_hook)
    ```

    Args:
        compressor: how gradients are sparsified, or a whole `SparseConfig` (see `sc.preset`).
        model: the model, DDP or inner, for parameter names; found by itself when the hook is registered with DDP.
        process_group: ranks that average; those of DDP's own group, or all, if None.
        scaler: the GradScaler in use, so that residuals are kept in unscaled units.
        options: the fields of `SparseConfig`: feedback, collective, value_codec, index_codec, dense_below, dense_steps,
            fuse_bytes.

    Raises:
        ConfigError: for an unknown or unacceptable option; names it and its value.
    """

    def __init__(
        self,
        compressor: Compressor | SparseConfig | None = None,
        *,
        model: torch.nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        self.config = SparseConfig.of(compressor, options)
        self.step = 0
        self.last_error: BaseException | None = None
        self.arena = Arena()
        self._given_model = model
        self._given_group = process_group
        self._scaler: torch.amp.GradScaler | None = None
        self._model: WrappedModel | None = None
        self._recorder = Recorder()
        self._memories = Memories()
        self._fusion = Fusion()
        self._lanes = Lanes(self.arena)
        self._chooser: Chooser | None = None  # made when the number of ranks is known
        self._unchecked: Checkpoint | None = None  # loaded before the model was known
        self._looked = -1  # step at which the DDP model was last looked up because of other buckets
        self._exchanged = False  # whether steps were taken, after the last loading
        if scaler is not None:
            self.attach_scaler(scaler)
        watch_use()

    def __getstate__(self) -> dict[str, Any]:
        """Refuses to be pickled whole: `state_dict` is what a checkpoint holds."""
        raise StateError("a SparseState is not picklable; save state.state_dict() and load it with load_state_dict")

    # --- options ------------------------------------------------------------------------------------------------

    def update(self, compressor: Compressor | SparseConfig | None = None, **options: Any) -> None:
        """Changes options from the next step on, without registering again. Must be called alike on all ranks.

        Args:
            compressor: another compressor, or a whole `SparseConfig`.
            options: fields of `SparseConfig`, or ``density=``.

        Raises:
            ConfigError: for an unknown or unacceptable option; nothing is changed then.
        """
        if isinstance(compressor, SparseConfig):
            self.config = compressor.change(**options)
        else:
            if compressor is not None:
                options = {"compressor": compressor, **options}
            self.config = self.config.change(**options)
        self._memories.change(self.config.feedback, self.step)
        self._chooser = None

    def attach_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Tells the state which GradScaler multiplies the losses. Call it before the first step.

        Raises:
            ConfigError: if it is no GradScaler.
            StateError: if steps were taken without it, since residuals are then in scaled units; what was loaded from
                a checkpoint never is.
        """
        if not isinstance(scaler, torch.amp.GradScaler):
            raise ConfigError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
        if self._scaler is not scaler and self._exchanged:
            raise StateError(
                f"a GradScaler was attached after {self.step} steps: the residuals are in the units of the gradients "
                "until then; attach it before the first step, or load a checkpoint into a new state"
            )
        self._scaler = scaler

    # --- one bucket ---------------------------------------------------------------------------------------------

    def start(
        self,
        index: int,
        parameters: Sequence[torch.Tensor],
        grad: torch.Tensor,
        *,
        last: bool,
        error: Exception | None = None,
    ) -> torch.futures.Future[torch.Tensor]:
        """Starts the exchange of one bucket; returns at once. Collective, in the same order on all ranks.

        Args:
            index: bucket number.
            parameters: the parameters whose gradients make up the bucket, in order.
            grad: the flat bucket, shape (n,). Mutated when the future completes: becomes the average over ranks.
            last: whether this is the last bucket of this backward pass.
            error: what has gone wrong on this rank already; all ranks are told instead of exchanging.
        """
        handed = Handed(index, parameters, grad, error)
        step = self.step
        if last:
            self.step += 1
        self._exchanged = True
        note_use()
        for batch in self._fusion.add(handed, self.config.fuse_bytes, last=last):
            self._start(batch, step, world())
        return handed.result

    def _start(self, batch: Batch, step: int, here: World) -> None:
        """Starts the exchange of what is to be exchanged as one."""
        index, average, place = batch.index, None, self._lanes.of(batch.device)
        label = f"bucket {index} of step {step}"
        self._recorder.submitted(step, last=batch.last)

        def failed(error: BaseException) -> None:
            self.last_error = error
            self._recorder.abandon(step)
            batch.fail(error)

        ids = tuple(id(p) for p in batch.parameters)
        try:
            wrappers = self._wrappers(here) if self._must_look(index, ids, step) else None
            ranks = wrappers.ranks if wrappers is not None else self._model.ranks if self._model is not None else None
            if batch.device.type != "cuda":  # what is measured is what the host does
                self._begin_choice(here, step, ranks, last=batch.last)
        except Exception as unknown:  # who else takes part, if anybody does; or all ranks have this error
            failed(unknown)
            return
        try:
            model = self._attach(here, wrappers)
            model.check_join()
            bucket, plan = self._prepare(batch, step, model)
        except Exception as caught:
            cause, numel = caught, batch.numel

            def tell(channel: Channel) -> CollectiveSteps[None]:
                header = blank_header(channel.rank, channel.size, index, step, numel)
                return report_failure(channel, header, cause, place.arena)

            here.engine.submit(
                Task(label, tell, lambda _: batch.finish(None), failed, group=ranks, key=(id(self), index))
            )
            return

        ready = place.side.mark()  # the gradient, and what the lines above have done to the bucket's memory

        def flat(arena: Arena) -> torch.Tensor:
            nonlocal average
            average = batch.flat(arena)
            return average

        def run(channel: Channel) -> CollectiveSteps[BucketReport]:
            steps = place.steps(channel, bucket, flat, plan, settle=not self._may_skip())
            return place.side.drive(steps, ready)

        def done(report: BucketReport) -> None:
            try:
                self._note(report, Candidate(plan.collective, plan.value_codec))
            finally:
                batch.finish(average)

        here.engine.submit(
            Task(
                label,
                run,
                place.in_order(done),
                place.in_order(failed),
                group=model.ranks,
                key=(id(self), index),
                patient=batch.is_small and not batch.last,
            )
        )

    def _note(self, report: BucketReport, candidate: Candidate) -> None:
        """Adds up what an exchange cost. Called on the engine's thread."""
        if self._chooser is not None:
            seconds = report.select_seconds + report.encode_seconds + report.wait_seconds + report.apply_seconds
            self._chooser.finished(report.bucket, candidate, seconds)
        self._recorder.finished(report, close=self._close_step)

    def _begin_choice(self, here: World, step: int, ranks: tuple[int, ...] | None, *, last: bool) -> None:
        """Lets `collective="auto"` go on: collective in the steps in which it measures or decides."""
        size = here.size if ranks is None else len(ranks)
        config = self.config
        if config.collective_kind is not None or config.compressor.is_dense or size == 1 or step < config.dense_steps:
            return
        if self._chooser is None or self._chooser.size != size:
            self._chooser = Chooser(config, size)

        def call(label: str, make: Callable[[Channel], CollectiveSteps[Any]]) -> Any:
            return here.engine.call(label, make, group=ranks)

        self._chooser.begin(step, call)
        if last:
            self._chooser.handed_over()

    def _may_skip(self) -> bool:
        """Returns whether the optimizer may skip a step because of one bucket, and throw the others away with it."""
        return self._scaler is not None and self._scaler.is_enabled()

    def _close_step(self, step: Metrics) -> None:
        """At the end of a step takes all of it back if the GradScaler will skip it."""
        self._memories.settle(skipped=step.skipped > 0)

    def _wrappers(self, here: World) -> Wrappers:
        return find_wrappers(self, self._given_model, self._given_group, here)

    def _must_look(self, index: int, ids: tuple[int, ...], step: int) -> bool:
        """Returns whether to find out which DDP model this is: at first, and when it may be another one by now.

        Another one shows by other buckets; so does a rebuild, hence once a step at most.
        """
        model = self._model
        if model is None or model.is_gone():
            return True
        if not model.ddps or self._looked == step or not self._memories.knows_other(index, ids):
            return False
        self._looked = step
        return True

    def _attach(self, here: World, wrappers: Wrappers | None = None) -> WrappedModel:
        """Returns what is known of the model this state serves, from these wrappers if they were looked up anew."""
        if wrappers is None:
            if self._model is not None and not self._model.is_gone():
                return self._model
            wrappers = self._wrappers(here)
        if self._model is not None and not wrappers.ddps:
            return self._model  # the script has dropped its DDP model; what was known still goes for the checkpoint
        found = WrappedModel.of(wrappers, self._given_model, here.rank)
        if found.names:
            self._model = found
        return found

    def _prepare(self, batch: Batch, step: int, model: WrappedModel) -> tuple[BucketMemory, Plan]:
        """Checks buckets and decides how they are exchanged."""
        if self._unchecked is not None:
            self._unchecked.check_model(model.shapes)
            self._unchecked = None
        where = f"rank {model.rank}, bucket {batch.index}"
        batch.check(where)
        config, numel = self.config, batch.numel
        bucket = self._memories.bucket(batch.index, batch.parameters, numel, model, where)
        k = config.compressor.k_for(numel, step)
        how = self._choose(batch.index, k, numel, step, model.size)
        self._memories.equip(bucket, config, how.kind, step, self._lanes.of(batch.device).home(how.kind))
        clip_norm: float | None = getattr(config.feedback, "clip_norm", None)
        if clip_norm is not None:
            clip_norm *= math.sqrt(numel / max(model.numel, 1) / model.size)
        return bucket, Plan(
            step=step,
            collective=how.kind,
            compressor=config.compressor,
            k=k,
            value_codec=how.values,
            index_codec=config.indices,
            feedback=config.feedback,
            grad_scale=self._grad_scale(),
            held=batch.unused_spans(bucket.layout) if model.may_skip and bucket.residual is not None else (),
            clip_norm=clip_norm,
            inner_group=config.inner_group,
            profiled=torch.autograd.profiler._is_profiler_enabled,
        )

    def _grad_scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler is not None and self._may_skip() else 1.0

    def _choose(self, index: int, k: int, numel: int, step: int, size: int) -> Candidate:
        """Returns how to exchange a bucket."""
        config, dense = self.config, Candidate(CollectiveKind.DENSE, self.config.dense_values)
        if config.compressor.is_dense or step < config.dense_steps or numel < config.dense_below:
            return dense
        if self._chooser is not None:
            return self._chooser.choose(index, numel, k)
        kind = config.collective_kind
        if kind is None:  # auto on a GPU, by bytes; or among one rank: nothing is sent
            kind = choose_collective(k, numel, size, config.values, config.indices, dense_codec=config.dense_values)
        return dense if kind == CollectiveKind.DENSE else Candidate(kind, config.values)

    # --- counters and checkpoints -------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """Returns a copy of this rank's counters since the state was made."""
        return self._recorder.total()

    def last_step(self) -> Metrics:
        """Returns this rank's counters of the last finished step alone."""
        return self._recorder.last_step()

    def buckets(self) -> dict[int, BucketReport]:
        """Returns the last report of every bucket, by bucket number."""
        return self._recorder.buckets()

    def on_step(self, callback: StepCallback) -> None:
        """Has `callback(step, metrics of that step)` called after every step, on the engine's thread: keep it short."""
        self._recorder.callbacks.append(callback)

    def explain(self) -> str:
        """Returns why buckets are exchanged as they are: a table of what was predicted, measured and chosen."""
        config, only = self.config, self.config.compressor.collectives
        if self._chooser is not None:
            return self._chooser.explain()
        if config.collective != "auto":
            return f"collective={config.collective!r} was given: nothing is chosen"
        if only:
            return f"{type(config.compressor).__name__} needs collective={only[0]!r}: nothing is chosen"
        return "nothing is chosen: there was no exchange yet that more than one rank takes part in"

    def is_settled(self) -> bool:
        """Returns whether `collective="auto"` is not trying anything now; always so where nothing is to be chosen."""
        return self._chooser is None or self._chooser.decided_at is not None

    def residual_norm(self) -> float:
        """Returns the 2-norm of this rank's residual over all parameters. Reads all of it; not collective."""
        return self._memories.residual_norm()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns this rank's state as a flat dict of tensors. Not collective: every rank saves its own.

        Keys: ``step``, ``rank``, ``world_size`` (int64), ``residual.<parameter name>``, with momentum correction
        ``velocity.<parameter name>``, with Adam's ``second_moment.<parameter name>`` too (float32, the parameter's
        shape) and ``moment_steps``, ``selector.<layout hash>`` (float64: a reused threshold, its age, its k).
        """
        return self._memories.save(self.step, self._attach(world()), self.config).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Restores this rank's state, into a live model too. Checks everything before it changes anything.

        Raises:
            StateError: for unknown keys, a parameter the model does not have or has in another shape, a model
                parameter that the checkpoint lacks (names them all), or a checkpoint of another rank or world size
                (see `reshard`).
        """
        loaded = Checkpoint.from_dict(state_dict)
        model = self._attach(world())
        if (loaded.rank, loaded.world_size) != (model.rank, model.size):
            raise StateError(
                f"rank {model.rank} of {model.size} was given the checkpoint of rank {loaded.rank} of "
                f"{loaded.world_size}; every rank loads its own; sparsecomm.reshard makes them for another world size"
            )
        loaded.check()
        if model.names:
            loaded.check_model(model.shapes)
        self._unchecked = None if model.names else loaded
        self._memories.load(loaded)
        self._chooser = None
        self.step = loaded.step
        self._exchanged = False
