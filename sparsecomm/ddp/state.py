"""The state of a comm hook: options, residuals by parameter name, counters and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sparsecomm.compress import Compressor
from sparsecomm.ddp.checkpoint import Checkpoint
from sparsecomm.ddp.choice import MethodChoice
from sparsecomm.ddp.convergence import Convergence, ConvergenceAlarm
from sparsecomm.ddp.fusion import Fusion, HandedBucket
from sparsecomm.ddp.hints import Hints
from sparsecomm.ddp.lanes import Lanes
from sparsecomm.ddp.memory import Memories, Waiting
from sparsecomm.ddp.model import ModelLookup, WrappedModel
from sparsecomm.ddp.native import NativeSums
from sparsecomm.ddp.scaling import LossScaling
from sparsecomm.ddp.submission import StateParts, Submission
from sparsecomm.ddp.unused import note_use, watch_use
from sparsecomm.errors import ConfigError, StateError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import Feedback
from sparsecomm.launch import world
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport, Metrics, Recorder, StepCallback

__all__ = ["SparseState"]


class SparseState:
    """State of `sparse_hook` for one DDP model.

    ```
    state = sc.SparseState(sc.TopK(density=0.01))
    ddp.register_comm_hook(state, sc.sparse_hook)
    ```

    Args:
        compressor: sparsifies the gradients; or a whole `SparseConfig`, for example from `sc.preset`.
        model: the model, DDP or plain, which names the parameters. Found automatically if the hook is registered with
            DDP.
        process_group: group of the ranks that average; None takes DDP's group, or all ranks without DDP.
        scaler: the GradScaler in use, so that residuals are kept in unscaled units.
        options: the fields of `SparseConfig`: feedback, collective, value_codec, index_codec, dense_below, dense_steps,
            fuse_bytes, inner_group.

    Attributes:
        config: the options.
        step: number of the next step.
        last_error: the latest error of an exchange; None if there was none.
        arena: buffers on the host.
        at_last_bucket: called when the last bucket of a backward pass is handed over, on the thread that does so.

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
        self.at_last_bucket: Callable[[], None] | None = None
        self._lookup = ModelLookup(model, process_group)
        self._memories = Memories()
        self._choice = MethodChoice()
        self._scaling = LossScaling()
        self._recorder = Recorder()
        self._hints = Hints(self.config)
        self._alarm = ConvergenceAlarm()
        self._parts = StateParts(
            self._lookup,
            self._memories,
            self._choice,
            self._scaling,
            Lanes(self.arena),
            self._recorder,
            self._hints,
            self._alarm,
            NativeSums(),
        )
        self._fusion = Fusion()
        self._exchanged = False  # whether a bucket was handed over since the last load
        if scaler is not None:
            self.attach_scaler(scaler)
        watch_use()

    def __getstate__(self) -> dict[str, Any]:
        """Refuses pickling; `state_dict` is for checkpoints."""
        raise StateError("a SparseState is not picklable; save state.state_dict() and load it with load_state_dict")

    # --- options ------------------------------------------------------------------------------------------------

    def update(self, compressor: Compressor | SparseConfig | None = None, **options: Any) -> None:
        """Changes options from the next step on. All ranks must call it alike; the hook stays registered.

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
        self._choice.reset()
        self._hints.change(self.config)
        self._alarm.begin_again(self.step)

    def follow(self, feedback: Feedback) -> None:
        """Takes over options of the same kind of feedback, from the next step on; nothing is forgotten.

        An optimizer calls it when a scheduler has changed its momentum or betas. All ranks must call it alike.

        Args:
            feedback: the same kind of feedback with other options.
        """
        self.config = self.config.change(feedback=feedback)

    def attach_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Tells the state which GradScaler multiplies the losses. Call it before the first step.

        Raises:
            ConfigError: if `scaler` is not a GradScaler.
            StateError: if steps were taken without it since the last load: residuals are then in scaled units.
        """
        if not isinstance(scaler, torch.amp.GradScaler):
            raise ConfigError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
        if self._scaling.scaler is not scaler and self._exchanged:
            raise StateError(
                f"a GradScaler was attached after {self.step} steps: the residuals are in units of the gradients so "
                "far; attach it before the first step, or load a checkpoint into a new state"
            )
        self._scaling.scaler = scaler

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
        """Hands over one bucket and returns at once. Collective, in the same order on all ranks.

        Its exchange starts now, or with later buckets if small ones are fused.

        Args:
            index: bucket number.
            parameters: parameters whose gradients make up the bucket, in order.
            grad: the flat bucket, shape (n,). Mutated: the average over ranks when the future completes.
            last: whether this is the last bucket of this backward pass.
            error: an error that this rank has met already; it is sent to all ranks in place of the bucket.

        Returns:
            A future of the averaged flat bucket. It fails if any rank fails.
        """
        if last and self.at_last_bucket is not None:
            self.at_last_bucket()
        handed = HandedBucket(index, parameters, grad, error)
        step = self.step
        if last:
            self.step += 1
            self._hints.run.step = self.step
        if not self._exchanged:
            note_use()
            self._exchanged = True
        for batch in self._fusion.add(handed, self.config.fuse_bytes, last=last):
            Submission(self, self._parts, batch, step, world()).start()
        return handed.result

    # --- counters and checkpoints -------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """Returns a copy of this rank's counters since the state was made."""
        return self._recorder.total()

    def last_step(self) -> Metrics:
        """Returns this rank's counters of the last finished step."""
        return self._recorder.last_step()

    def buckets(self) -> dict[int, BucketReport]:
        """Returns the last report of every bucket, by bucket number."""
        return self._recorder.buckets()

    def on_step(self, callback: StepCallback) -> None:
        """Registers a callback for the end of every step.

        Args:
            callback: called as `callback(step, metrics of that step)` on the engine's thread. Keep it short.
        """
        self._recorder.callbacks.append(callback)

    def explain(self) -> str:
        """Returns the reasons for the methods in use: a table of predictions, measurements and choices.

        A line with the figures of `convergence` follows, if anything is compressed.
        """
        reasons, found = self._choice.explain(self.config), self.convergence()
        return reasons if found is None else f"{reasons}\nconvergence: {found}"

    def is_settled(self) -> bool:
        """Returns whether `collective="auto"` has stopped trying methods. True if there is nothing to choose."""
        return self._choice.is_settled()

    def module(self) -> torch.nn.Module | None:
        """Returns the model whose gradients are averaged, without its DDP wrapper; None if it is unknown so far."""
        return self._lookup.module(self, world())

    def group_size(self) -> int:
        """Returns the number of ranks that average. Not collective."""
        return self.wrapped_model().size

    def wrapped_model(self) -> WrappedModel:
        """Returns names, shapes and ranks of the model, looked up now if they are not known yet. Not collective."""
        return self._lookup.attach(self, world())

    def waiting(self, parameters: Sequence[torch.Tensor]) -> list[Waiting]:
        """Returns what this rank holds back of these parameters; none of a parameter without a residual.

        Call it between steps. Not collective.

        Args:
            parameters: parameters of the model.
        """
        return self._memories.waiting(parameters, self.wrapped_model().names)

    def delivered(self) -> dict[int, tuple[int, float]]:
        """Returns one element of the last average of some buckets, to recognise it in `.grad`. Not collective.

        Returns:
            Place and unscaled value by `id(parameter)`. The place counts elements in the parameter's memory order.
            Empty in most steps.
        """
        return self._memories.delivered(self.step - 1)

    def residual_norm(self) -> float:
        """Returns the 2-norm of this rank's residual over all parameters. Reads every element. Not collective."""
        return self._memories.residual_norm()

    def convergence(self) -> Convergence | None:
        """Returns estimates of how compression affects convergence; None if no bucket was exchanged compressed.

        Cheap, though it waits for a GPU. Not collective: the figures are those of this rank.
        """
        return self._memories.convergence()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns this rank's state as a flat dict of tensors. Not collective: every rank saves its own.

        Keys:
            ``step``, ``rank``, ``world_size``: int64.
            ``shard``, ``shards``: int64; which of the shards of a sharded model this rank holds.
            ``residual.<parameter name>``: float32, in the shape of this rank's part of the parameter.
            ``velocity.<parameter name>``: the same; with momentum or Adam correction.
            ``second_moment.<parameter name>``: the same; with Adam correction.
            ``moment_steps``: int64; with Adam correction.
            ``selector.<layout hash>``: float64, shape (3,): a reused threshold, its age and its k.
            ``alignment.<parameter name>``: float64, shape (6,): ranks, measurements, and squared norms of the mean and
            of each rank, of gradients and of residuals; with the optimizers of `sparsecomm.optim`.
        """
        return self._memories.save(self.step, self.wrapped_model(), self.config).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
        """Restores this rank's state, also in the middle of training. Checks everything before it changes anything.

        All ranks must load between the same two steps. Not collective otherwise.

        Args:
            state_dict: what `state_dict` returned. Not changed, and not kept.
            strict: whether the checkpoint must be of the same parameters. Otherwise parameters that it lacks start
                without a residual, and what it has of parameters that the model lacks is dropped, with a warning that
                says how much residual is lost.

        Raises:
            StateError: for entries that are missing, unknown or damaged; for parameters that only the checkpoint or
                only the model has, or that differ in shape, with what would map their names; or for the checkpoint of
                another rank or world size (see `reshard`). It names the entry. If the model is not known yet, its
                parameters are compared in the first step.
        """
        self._choice.native.reset()  # also if this rank fails, since the others may not
        loaded = Checkpoint.from_dict(state_dict)
        model = self.wrapped_model()
        if (loaded.rank, loaded.world_size) != (model.rank, model.size):
            raise StateError(
                f"rank {model.rank} of {model.size} was given the checkpoint of rank {loaded.rank} of "
                f"{loaded.world_size}; every rank loads its own, and sparsecomm.reshard converts to another world size"
            )
        if loaded.place != model.place:
            raise StateError(
                f"rank {model.rank} of {model.size}, which holds {model.place}, was given the checkpoint of "
                f"{loaded.place}; every rank loads its own, and sparsecomm.reshard with shards= converts them"
            )
        loaded.check()
        self._memories.load(loaded, model, strict=strict)
        self._choice.reset()
        self._alarm.begin_again(loaded.step)
        self.step = loaded.step
        self._exchanged = False
