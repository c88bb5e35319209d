"""What a sparse hook keeps from step to step: options, residuals by parameter name, counters."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives import choose_collective
from sparsecomm.compress import BucketLayout, Compressor, ErrorFeedback, ResidualStore, TopK
from sparsecomm.errors import ConfigError, StateError
from sparsecomm.exchange import Bucket, Plan, blank_header, exchange, report_failure
from sparsecomm.hooks.names import find_ddp, parameter_names
from sparsecomm.launch import World, world
from sparsecomm.metrics import BucketReport, Metrics
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import GRAD_DTYPES, MAX_NUMEL, IndexCodec, ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["SparseState"]

_COLLECTIVES = {"auto": None, "allgather": CollectiveKind.ALLGATHER, "dense": CollectiveKind.DENSE}
_VALUE_CODECS = {c.name.lower(): c for c in ValueCodec}
_INDEX_CODECS = {"auto": None} | {c.name.lower(): c for c in IndexCodec if c != IndexCodec.DENSE}
_RESIDUAL = "residual."


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
        compressor: how gradients are sparsified: `TopK`, `ThresholdTopK` or `Dense`.
        feedback: `ErrorFeedback()` keeps what is not sent for later steps; None drops it.
        collective: "auto" (the one that moves fewer bytes), "allgather" or "dense".
        value_codec: "fp32", "fp16", "bf16" or "int8"; what rounding drops stays in the residual.
        index_codec: "auto" (the smallest), "rice", "bitpack", "bitmap" or "raw".
        dense_below: buckets of fewer elements are exchanged densely.
        dense_steps: the first steps are exchanged densely.
        model: the model, DDP or inner, for parameter names; found by itself when the hook is registered with DDP.

    Raises:
        ConfigError: for an unknown or unacceptable option; names it and its value.
    """

    def __init__(
        self,
        compressor: Compressor | None = None,
        *,
        feedback: ErrorFeedback | None = ErrorFeedback(),  # noqa: B008 - frozen, no state
        collective: str = "auto",
        value_codec: str = "fp16",
        index_codec: str = "auto",
        dense_below: int = 0,
        dense_steps: int = 0,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.compressor = TopK() if compressor is None else compressor
        if not isinstance(self.compressor, Compressor):
            raise ConfigError(
                f"compressor must be a sparsecomm compressor such as TopK(density=0.01), got {compressor!r}"
            )
        if not (feedback is None or isinstance(feedback, ErrorFeedback)):
            raise ConfigError(f"feedback must be ErrorFeedback() or None, got {feedback!r}")
        self.feedback = feedback
        self.collective: CollectiveKind | None = _option("collective", collective, _COLLECTIVES)
        self.value_codec: ValueCodec = _option("value_codec", value_codec, _VALUE_CODECS)
        self.index_codec: IndexCodec | None = _option("index_codec", index_codec, _INDEX_CODECS)
        self.dense_below = _count("dense_below", dense_below)
        self.dense_steps = _count("dense_steps", dense_steps)
        self.step = 0
        self.last_error: BaseException | None = None
        self.arena = Arena()
        self._metrics = Metrics()
        self._lock = threading.Lock()
        self._store = ResidualStore()
        self._known: dict[int, _Known] = {}
        self._selectors: dict[int, torch.Tensor] = {}
        self._names: dict[int, str] | None = None if model is None else parameter_names(model)

    def __getstate__(self) -> dict[str, Any]:
        """Refuses to be pickled whole: `state_dict` is what a checkpoint holds."""
        raise StateError("a SparseState is not picklable; save state.state_dict() and load it with load_state_dict")

    # --- one bucket ---------------------------------------------------------------------------------------------

    def start(
        self, index: int, parameters: Sequence[torch.Tensor], grad: torch.Tensor, *, last: bool
    ) -> torch.futures.Future[torch.Tensor]:
        """Starts the exchange of one bucket; returns at once. Collective, in the same order on all ranks.

        Args:
            index: bucket number.
            parameters: the parameters whose gradients make up the bucket, in order.
            grad: the flat bucket, shape (n,). Mutated when the future completes: becomes the average over ranks.
            last: whether this is the last bucket of this backward pass.
        """
        here = world()
        step = self.step
        if last:
            self.step += 1
        outer: torch.futures.Future[Any] = torch.futures.Future()
        # Only a callback that raises gives a torch future an error that C++ can read (set_exception does not).
        result: torch.futures.Future[torch.Tensor] = outer.then(_value_or_raise)
        label = f"bucket {index} of step {step}"

        def done(report: BucketReport) -> None:
            with self._lock:
                self._metrics.add(report)
                self._metrics.steps += int(last)
            outer.set_result(grad)

        def failed(error: BaseException) -> None:
            self.last_error = error
            outer.set_result(error)

        try:
            bucket, plan = self._prepare(index, parameters, grad, step, here)
        except Exception as error:
            header = blank_header(here.rank, here.size, index, step, grad.numel())
            cause = error

            def tell(channel: Channel) -> CollectiveSteps[None]:
                return report_failure(channel, header, cause, self.arena)

            here.engine.submit(label, tell, done, failed)
            return result

        def run(channel: Channel) -> CollectiveSteps[BucketReport]:
            return exchange(channel, bucket, grad, plan, self.arena)

        here.engine.submit(label, run, done, failed)
        return result

    def _prepare(
        self, index: int, parameters: Sequence[torch.Tensor], grad: torch.Tensor, step: int, here: World
    ) -> tuple[Bucket, Plan]:
        """Checks a bucket and decides how it is exchanged."""
        _check_gradient(grad, here.rank, index)
        bucket = self._bucket(index, parameters, grad)
        numel = grad.numel()
        k = self.compressor.k_for(numel, step)
        plan = Plan(
            step=step,
            collective=self._collective(k, numel, step, here.size),
            compressor=self.compressor,
            k=k,
            value_codec=self.value_codec,
            index_codec=self.index_codec,
            feedback=self.feedback is not None,
        )
        if bucket.residual is None and (plan.collective != CollectiveKind.DENSE or self._store.has(bucket.layout)):
            bucket.residual = self._store.bucket(bucket.layout)
        return bucket, plan

    def _collective(self, k: int, numel: int, step: int, size: int) -> CollectiveKind:
        if self.compressor.is_dense or step < self.dense_steps or numel < self.dense_below:
            return CollectiveKind.DENSE
        if self.collective is not None:
            return self.collective
        return choose_collective(k, numel, size, self.value_codec, self.index_codec)

    def _bucket(self, index: int, parameters: Sequence[torch.Tensor], grad: torch.Tensor) -> Bucket:
        """Returns what is known of this bucket, moving residuals by name if DDP has rebuilt its buckets."""
        ids = tuple(id(p) for p in parameters)
        known = self._known.get(index)
        if known is not None and known.parameters == ids and known.bucket.layout.numel == grad.numel():
            return known.bucket
        layout = BucketLayout.of([(self._name(p), p) for p in parameters])
        if layout.numel != grad.numel():
            raise ConfigError(
                f"bucket {index} has {grad.numel()} elements, its {len(ids)} parameters have {layout.numel}"
            )
        bucket = Bucket(index, layout)
        if self._store.has(layout):
            bucket.residual = self._store.bucket(layout)
        selector = self._selectors.pop(layout.hash, None)
        if selector is not None:
            bucket.memory.threshold = float(selector[0])
            bucket.memory.age, bucket.memory.k = int(selector[1]), int(selector[2])
        self._known[index] = _Known(ids, bucket)
        return bucket

    def _name(self, parameter: torch.Tensor) -> str:
        names = self._find_names()
        if names is None:
            raise ConfigError(
                "the model of this SparseState is unknown; register it with ddp.register_comm_hook(state, sparse_hook) "
                "or pass model= to SparseState"
            )
        name = names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"a bucket holds a parameter of shape {tuple(parameter.shape)} that is not in the state's model; "
                "one SparseState serves one model"
            )
        return name

    def _find_names(self) -> dict[int, str] | None:
        if self._names is None:
            found = find_ddp(self)
            self._names = None if found is None else parameter_names(found)
        return self._names

    # --- counters and checkpoints -------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """Returns a copy of this rank's counters since the state was made."""
        with self._lock:
            return replace(self._metrics)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns this rank's state as a flat dict of tensors. Not collective: every rank saves its own.

        Keys: ``step`` (int64), ``residual.<parameter name>`` (float32, the parameter's shape), and
        ``selector.<layout hash>`` (float64: threshold, age, k of a reused threshold).
        """
        out = {"step": torch.tensor(self.step)}
        if self.feedback is not None:
            out.update({_RESIDUAL + name: t for name, t in sorted(self._store.state().items())})
        for known in self._known.values():
            m = known.bucket.memory
            if m.k:
                out[f"selector.{known.bucket.layout.hash:016x}"] = torch.tensor(
                    [m.threshold, m.age, m.k], dtype=torch.float64
                )
        return out

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Restores this rank's state, into a live model too. Checks everything before it changes anything.

        Raises:
            StateError: for unknown keys, a parameter the model does not have or has in another shape, or a model
                parameter that the checkpoint lacks; names them all.
        """
        residuals, selectors, step = _split(state_dict)
        names = self._find_names()
        if names is not None:
            _check_names(set(residuals), set(names.values()))
        self._store.load(residuals)
        for known in self._known.values():
            known.bucket.memory = type(known.bucket.memory)()
        self._known.clear()
        self._selectors = selectors
        self.step = step


def _value_or_raise(future: torch.futures.Future[Any]) -> torch.Tensor:
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return value  # type: ignore[no-any-return]


def _option(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be an int >= 0, got {value!r}")
    return value


def _check_gradient(grad: torch.Tensor, rank: int, bucket: int) -> None:
    where = f"rank {rank}, bucket {bucket}"
    if grad.layout != torch.strided:
        raise ConfigError(
            f"{where}: gradients in {grad.layout} layout are not supported; build the embedding with sparse=False"
        )
    if grad.dtype not in GRAD_DTYPES:
        raise ConfigError(
            f"{where}: gradients of dtype {grad.dtype} are not supported, only float32, float16, bfloat16"
        )
    if grad.device.type != "cpu":
        raise ConfigError(f"{where}: gradients on {grad.device} are not supported by this version, only on the CPU")
    if grad.numel() > MAX_NUMEL:
        raise ConfigError(f"{where}: {grad.numel()} elements are more than {MAX_NUMEL}; lower DDP's bucket_cap_mb")


def _split(
    state_dict: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor], int]:
    """Sorts a checkpoint's entries into residuals by name, selectors by layout hash, and the step."""
    residuals: dict[str, torch.Tensor] = {}
    selectors: dict[int, torch.Tensor] = {}
    unknown = []
    for key, value in state_dict.items():
        if key.startswith(_RESIDUAL):
            residuals[key.removeprefix(_RESIDUAL)] = value
        elif key.startswith("selector."):
            selectors[int(key.removeprefix("selector."), 16)] = value
        elif key != "step":
            unknown.append(key)
    if unknown or "step" not in state_dict:
        what = f"has unknown entries {sorted(unknown)}" if unknown else "has no entry 'step'"
        raise StateError(f"this is not a SparseState checkpoint: it {what}")
    return residuals, selectors, int(state_dict["step"])


def _check_names(loaded: set[str], model: set[str]) -> None:
    extra, missing = sorted(loaded - model), sorted(model - loaded)
    if extra:
        raise StateError(f"the checkpoint is of another model: it has residuals of {extra}, which this model lacks")
    if loaded and missing:
        raise StateError(f"the checkpoint is of another model: it lacks the residuals of {missing}")
