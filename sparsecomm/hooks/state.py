"""What a sparse hook keeps from step to step: options, residuals by parameter name, counters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparsecomm.arena import Arena
from sparsecomm.collectives import choose_collective
from sparsecomm.compress import AdamCorrection, Bucket, BucketLayout, Compressor, ResidualStore
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.config import SparseConfig
from sparsecomm.errors import ConfigError, StateError
from sparsecomm.exchange import Plan, blank_header, exchange, report_failure
from sparsecomm.hooks.checkpoint import Checkpoint, fill_names
from sparsecomm.hooks.gradients import check_gradient, unused_spans
from sparsecomm.hooks.served import ServedModel, Wrappers, find_wrappers
from sparsecomm.launch import World, world
from sparsecomm.metrics import BucketReport, Metrics, Recorder, StepCallback
from sparsecomm.strategies import strategy_of
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["SparseState"]


@dataclass(slots=True)
class _Known:
    """A bucket as DDP last presented it."""

    parameters: tuple[int, ...]
    bucket: Bucket


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
        options: the fields of `SparseConfig`: feedback, collective, value_codec, index_codec, dense_below, dense_steps.

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
        self._model: ServedModel | None = None
        self._recorder = Recorder()
        self._memories = {kind: ResidualStore(kind) for kind in ("residual", "velocity", "second_moment")}
        self._moments_since = 0  # step at which the moments of Adam correction were zero
        self._known: dict[int, _Known] = {}
        self._selectors: dict[int, SelectorMemory] = {}
        self._unchecked: Checkpoint | None = None  # loaded before the model was known
        self._looked = -1  # step at which the DDP model was last looked up because of other buckets
        self._exchanged = False  # whether steps were taken, after the last loading
        if scaler is not None:
            self.attach_scaler(scaler)

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
        for known in self._known.values():
            known.bucket.memory = SelectorMemory()
            known.bucket.shared = None
        self._selectors.clear()
        for kind in set(self._memories) - {"residual", *self._moments()}:
            self._memories[kind] = ResidualStore(kind)
        if not self._memories["second_moment"].names():
            self._moments_since = self.step

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
        here = world()
        step = self.step
        if last:
            self.step += 1
        outer: torch.futures.Future[Any] = torch.futures.Future()
        # Only a callback that raises gives a torch future an error that C++ can read (set_exception does not).
        result: torch.futures.Future[torch.Tensor] = outer.then(_value_or_raise)
        label = f"bucket {index} of step {step}"
        self._recorder.submitted(step, last=last)
        self._exchanged = True

        def done(report: BucketReport) -> None:
            try:
                self._recorder.finished(report, close=self._close_step)
            finally:
                outer.set_result(grad)

        def failed(error: BaseException) -> None:
            self.last_error = error
            self._recorder.abandon(step)
            outer.set_result(error)

        ids = tuple(id(p) for p in parameters)
        try:
            wrappers = self._wrappers(here) if self._must_look(index, ids, step) else None
        except Exception as unknown:  # who else takes part, if anybody does
            failed(unknown)
            return result
        ranks = wrappers.ranks if wrappers is not None else self._model.ranks if self._model is not None else None
        try:
            if error is not None:
                raise error
            model = self._attach(here, wrappers)
            model.check_join()
            bucket, plan = self._prepare(index, parameters, grad, step, model)
        except Exception as caught:
            cause, numel = caught, grad.numel()

            def tell(channel: Channel) -> CollectiveSteps[None]:
                header = blank_header(channel.rank, channel.size, index, step, numel)
                return report_failure(channel, header, cause, self.arena)

            here.engine.submit(label, tell, done, failed, group=ranks, key=(id(self), index))
            return result

        def run(channel: Channel) -> CollectiveSteps[BucketReport]:
            return exchange(channel, bucket, grad, plan, self.arena, settle=not self._may_skip())

        here.engine.submit(label, run, done, failed, group=model.ranks, key=(id(self), index))
        return result

    def _may_skip(self) -> bool:
        """Returns whether the optimizer may skip a step because of one bucket, and throw the others away with it."""
        return self._scaler is not None and self._scaler.is_enabled()

    def _close_step(self, step: Metrics) -> None:
        """At the end of a step takes all of it back if the GradScaler will skip it."""
        for known in self._known.values():
            known.bucket.settle(skipped=step.skipped > 0)

    def _wrappers(self, here: World) -> Wrappers:
        return find_wrappers(self, self._given_model, self._given_group, here)

    def _must_look(self, index: int, ids: tuple[int, ...], step: int) -> bool:
        """Returns whether to find out which DDP model this is: at first, and when it may be another one by now.

        Another one shows by other buckets; so does a rebuild, hence once a step at most.
        """
        model = self._model
        if model is None or model.is_gone():
            return True
        known = self._known.get(index)
        if not model.ddps or known is None or known.parameters == ids or self._looked == step:
            return False
        self._looked = step
        return True

    def _attach(self, here: World, wrappers: Wrappers | None = None) -> ServedModel:
        """Returns what is known of the model this state serves, from these wrappers if they were looked up anew."""
        if wrappers is None:
            if self._model is not None and not self._model.is_gone():
                return self._model
            wrappers = self._wrappers(here)
        if self._model is not None and not wrappers.ddps:
            return self._model  # the script has dropped its DDP model; what was known still goes for the checkpoint
        found = ServedModel.of(wrappers, self._given_model, here.rank)
        if found.names:
            self._model = found
        return found

    def _prepare(
        self, index: int, parameters: Sequence[torch.Tensor], grad: torch.Tensor, step: int, model: ServedModel
    ) -> tuple[Bucket, Plan]:
        """Checks a bucket and decides how it is exchanged."""
        if self._unchecked is not None:
            self._unchecked.check_model(model.shapes)
            self._unchecked = None
        where = f"rank {model.rank}, bucket {index}"
        check_gradient(grad, parameters, where)
        config, numel = self.config, grad.numel()
        bucket = self._bucket(index, parameters, grad, model, where)
        k = config.compressor.k_for(numel, step)
        collective = self._collective(k, numel, step, model.size)
        moments, residuals = self._moments(), self._memories["residual"]
        rounds = config.dense_values != ValueCodec.FP32 and config.feedback is not None
        if strategy_of(collective).needs_residual or moments or rounds or residuals.has(bucket.layout):
            bucket.residual = residuals.bucket(bucket.layout)
        for kind in ("velocity", "second_moment"):
            setattr(bucket, kind, self._memories[kind].bucket(bucket.layout) if kind in moments else None)
        bucket.age = step - self._moments_since + 1
        clip_norm: float | None = getattr(config.feedback, "clip_norm", None)
        if clip_norm is not None:
            clip_norm *= math.sqrt(numel / max(model.numel, 1) / model.size)
        return bucket, Plan(
            step=step,
            collective=collective,
            compressor=config.compressor,
            k=k,
            value_codec=config.dense_values if collective == CollectiveKind.DENSE else config.values,
            index_codec=config.indices,
            feedback=config.feedback,
            grad_scale=self._grad_scale(),
            held=unused_spans(bucket.layout, grad) if model.may_skip and bucket.residual is not None else (),
            clip_norm=clip_norm,
            profiled=torch.autograd.profiler._is_profiler_enabled,
        )

    def _moments(self) -> tuple[str, ...]:
        """Returns the kinds of memory that this feedback keeps beside the residual."""
        return () if self.config.feedback is None else self.config.feedback.memories

    def _grad_scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler is not None and self._may_skip() else 1.0

    def _collective(self, k: int, numel: int, step: int, size: int) -> CollectiveKind:
        config = self.config
        if config.compressor.is_dense or step < config.dense_steps or numel < config.dense_below:
            return CollectiveKind.DENSE
        if config.collective_kind is not None:
            return config.collective_kind
        return choose_collective(k, numel, size, config.values, config.indices, dense_codec=config.dense_values)

    def _bucket(
        self, index: int, parameters: Sequence[torch.Tensor], grad: torch.Tensor, model: ServedModel, where: str
    ) -> Bucket:
        """Returns what is known of this bucket, moving residuals by name if DDP has rebuilt its buckets."""
        ids = tuple(id(p) for p in parameters)
        known = self._known.get(index)
        if known is not None and known.parameters == ids and known.bucket.layout.numel == grad.numel():
            return known.bucket
        layout = BucketLayout.of([(model.name_of(p, where), p) for p in parameters])
        if layout.numel != grad.numel():
            raise ConfigError(f"{where}: {grad.numel()} elements, but its {len(ids)} parameters have {layout.numel}")
        bucket = Bucket(index, layout, memory=self._selectors.pop(layout.hash, SelectorMemory()))
        self._known[index] = _Known(ids, bucket)
        return bucket

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

    def residual_norm(self) -> float:
        """Returns the 2-norm of this rank's residual over all parameters. Reads all of it; not collective."""
        return math.sqrt(sum(float(t.square().sum(dtype=torch.float64)) for t in self._memories["residual"].slices()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns this rank's state as a flat dict of tensors. Not collective: every rank saves its own.

        Keys: ``step``, ``rank``, ``world_size`` (int64), ``residual.<parameter name>``, with momentum correction
        ``velocity.<parameter name>``, with Adam's ``second_moment.<parameter name>`` too (float32, the parameter's
        shape) and ``moment_steps``, ``selector.<layout hash>`` (float64: a reused threshold, its age, its k).
        """
        model = self._attach(world())
        made = Checkpoint(self.step, model.rank, model.size)
        feedback = self.config.feedback
        # Named in full from the first step on, so that torch.distributed.checkpoint, which fills what it is handed,
        # loads into a fresh state.
        kept = model.trainable if feedback is not None and not self.config.compressor.is_dense else set()
        for kind, named in made.memories.items():
            if kind == "residual" or kind in self._moments():
                named.update(self._memories[kind].state() if feedback is not None else {})
                fill_names(named, model.shapes, kept)
        if isinstance(feedback, AdamCorrection):
            made.moment_steps = self.step - self._moments_since
        made.selectors = dict(self._selectors)
        for known in self._known.values():
            if known.bucket.memory.k:
                made.selectors[known.bucket.layout.hash] = known.bucket.memory
        return made.to_dict()

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
        for kind, store in self._memories.items():
            store.load(loaded.memories[kind])
        self._known.clear()
        self._selectors = loaded.selectors
        self.step = loaded.step
        self._moments_since = loaded.step - loaded.moment_steps
        self._exchanged = False


def _value_or_raise(future: torch.futures.Future[Any]) -> torch.Tensor:
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return value  # type: ignore[no-any-return]
