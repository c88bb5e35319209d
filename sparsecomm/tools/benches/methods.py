"""The training methods that `bench train` and `bench peers` compare: ways of averaging gradients.

Each is attached to a model in the way its users do it. `method` registers one, and plugin modules may register more.
Our methods run over this job's transport (MPI under mpirun), torch's over Gloo.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.method import Scope, methods
from sparsecomm.tools.benches.compressors import compressor_for

__all__ = [
    "METHODS",
    "Attached",
    "Run",
    "TrainingMethod",
    "load_plugins",
    "method",
    "powersgd",
    "runs_of",
    "silent_hook",
]


@dataclass(frozen=True, slots=True)
class Attached:
    """A model whose gradients a method averages.

    Attributes:
        model: The model to run forward and backward on.
        step_bytes: Returns the bytes that this rank sent in a step, given the step's number; called after the step.
        counted: Whether these bytes are counted when sent; otherwise they are computed from the algorithm.
        average: Called between backward and the optimizer, for methods that do not hook into backward.
        momentum: Momentum of the optimizer; 0 if the method applies momentum itself.
        settled: Returns whether the method has chosen its final behaviour; steps before that are not timed.
        power: State of torch's PowerSGD hook; None for other methods.
    """

    model: nn.Module
    step_bytes: Callable[[int], int]
    counted: bool = False
    average: Callable[[], None] | None = None
    momentum: float = 0.9
    settled: Callable[[], bool] = lambda: True
    power: powerSGD_hook.PowerSGDState | None = None


Attach = Callable[[nn.Module, float], Attached]
"""Attaches a method to a model, given the model and a density. Collective. Methods without a density ignore it."""


@dataclass(frozen=True, slots=True)
class TrainingMethod:
    """A registered way of averaging gradients.

    Attributes:
        name: Name on the command line and in results.
        attach: Attaches it to a model.
        sparse: Whether it runs once for each density.
        package: Module that it needs to import, unless it is ours or torch's.
        warmup: Number of steps before it reaches its final behaviour.
        default: Whether it runs if the user names no methods.
    """

    name: str
    attach: Attach
    sparse: bool
    package: str | None
    warmup: int
    default: bool

    @property
    def missing(self) -> str | None:
        """Why it cannot run in this environment, or None."""
        if self.package is None or importlib.util.find_spec(self.package.split(".")[0]) is not None:
            return None
        return f"not installed: no module {self.package!r}"


METHODS: dict[str, TrainingMethod] = {}
"""Methods by name."""


def method(
    name: str, *, sparse: bool = False, package: str | None = None, warmup: int = 2, default: bool = True
) -> Callable[[Attach], Attach]:
    """Registers a method. The arguments are attributes of `TrainingMethod`."""

    def register(attach: Attach) -> Attach:
        METHODS[name] = TrainingMethod(name, attach, sparse, package, warmup, default)
        return attach

    return register


@dataclass(frozen=True, slots=True)
class Run:
    """A method, and its density if it has one."""

    method: str
    density: float | None = None

    def __str__(self) -> str:
        return self.method if self.density is None else f"{self.method}@{self.density:g}"

    @classmethod
    def parse(cls, text: str) -> Run:
        """Returns the run with this text, the inverse of `str`."""
        name, _, density = text.partition("@")
        return cls(name, float(density) if density else None)


def runs_of(methods: Sequence[str], densities: Sequence[float]) -> list[Run]:
    """Returns the runs of these methods; a sparse method has one for each density.

    Args:
        methods: Names; if empty, all methods that run by default.
        densities: Densities in (0, 1].

    Raises:
        ConfigError: A method is unknown, or a density is out of range.
    """
    names = list(dict.fromkeys(methods)) or [m.name for m in METHODS.values() if m.default]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConfigError(f"method {', '.join(map(repr, unknown))} does not exist; known are {', '.join(METHODS)}")
    wrong = [d for d in densities if not 0 < d <= 1]
    if wrong or not densities:
        raise ConfigError(f"densities must be in (0, 1], got {', '.join(map(str, wrong)) or 'none'}")
    runs = []
    for name in names:
        runs += [Run(name, d) for d in dict.fromkeys(densities)] if METHODS[name].sparse else [Run(name)]
    return runs


def load_plugins(modules: Sequence[str]) -> None:
    """Imports modules that register methods.

    Raises:
        ConfigError: A module cannot be imported.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"plugin {name!r} cannot be imported: {error}") from None


def _ring_bytes(elements: int, itemsize: int) -> int:
    """Returns the bytes that a rank sends in a ring allreduce."""
    size = dist.get_world_size()
    return 2 * (size - 1) * elements * itemsize // size


def _ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wraps a model in DDP.

    All ranks build the same model, so DDP does not send it, which at 100 Mbit/s would take longer than a run. Gradients
    are views of the buckets, as DDP's documentation advises, which saves every method a copy.
    """
    return DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True, **options)


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- torch's methods ----------------------------------------------------------------------------------------------


@method("none")
def _none(model: nn.Module, density: float) -> Attached:
    """No communication; every rank trains alone. The other methods are compared with its step time."""
    return Attached(model, lambda step: 0)


@method("ddp-gloo")
def _plain(model: nn.Module, density: float) -> Attached:
    """Plain DDP in float32."""
    sent = _ring_bytes(_numel(model), 4)
    return Attached(_ddp(model), lambda step: sent)


def silent_hook(state: object, bucket):  # type: ignore[no-untyped-def]
    """A DDP hook that sends nothing."""
    tensor = bucket.buffer()
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[tensor.device] if tensor.is_cuda else None)
    done.set_result(tensor)
    return done


@method("ddp-silent", default=False)
def _silent(model: nn.Module, density: float) -> Attached:
    """DDP with a hook that sends nothing. Its exposed time is the cost of filling buckets, the minimum for any hook."""
    ddp = _ddp(model)
    ddp.register_comm_hook(None, silent_hook)
    return Attached(ddp, lambda step: 0)


def _half(model: nn.Module, hook: Callable[..., Any]) -> Attached:
    ddp = _ddp(model)
    ddp.register_comm_hook(None, hook)
    sent = _ring_bytes(_numel(model), 2)
    return Attached(ddp, lambda step: sent)


@method("fp16")
def _fp16(model: nn.Module, density: float) -> Attached:
    return _half(model, default_hooks.fp16_compress_hook)


@method("bf16")
def _bf16(model: nn.Module, density: float) -> Attached:
    return _half(model, default_hooks.bf16_compress_hook)


def _bf16_whatever_the_backend(state, bucket):  # type: ignore[no-untyped-def]
    """Torch's bf16 hook under another name: without NCCL, DDP refuses it by name, although Gloo can sum bfloat16."""
    return default_hooks.bf16_compress_hook(state, bucket)


@method("bf16-gloo", default=False)
def _bf16_gloo(model: nn.Module, density: float) -> Attached:
    return _half(model, _bf16_whatever_the_backend)


@method("int8-torch", default=False)
def _int8(model: nn.Module, density: float) -> Attached:
    """Torch's 8-bit quantization hook, which gathers every rank's gradient with one byte per element."""
    ddp = _ddp(model)
    ddp.register_comm_hook(None, quantization_hooks.quantization_pertensor_hook)
    sent = (dist.get_world_size() - 1) * _numel(model)
    return Attached(ddp, lambda step: sent)


_POWER_START = 2  # first compressed step, the least that torch accepts; before it, gradients are sent whole


def powersgd(model: nn.Module, rank: int, start: int = _POWER_START) -> Attached:
    """Attaches torch's PowerSGD hook, which approximates matrices at this rank from step `start` on. Collective."""
    start = max(start, _POWER_START)
    # One bucket holds the whole model, since with two it deadlocks on Gloo, where its callbacks wait for other futures.
    ddp = _ddp(model, bucket_cap_mb=1 + 4 * _numel(model) // 2**20)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=start)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    dense, low = _ring_bytes(_numel(model), 4), _ring_bytes(_low_rank_numel(model, rank), 4)
    return Attached(ddp, lambda step: dense if step < start else low, power=state)


def _low_rank_numel(model: nn.Module, rank: int) -> int:
    """Returns the elements that PowerSGD sends: two factors of a matrix if they halve its size, all else whole."""
    total = 0
    for p in model.parameters():
        rows = p.shape[0] if p.dim() > 1 else 1
        factors = (rows + p.numel() // rows) * rank
        total += factors if p.dim() > 1 and 2 * factors < p.numel() else p.numel()
    return total


def _by_rank(rank: int) -> Attach:
    return lambda model, density: powersgd(model, rank)


for _rank in (1, 4):
    method(f"powersgd-r{_rank}", warmup=_POWER_START + 1)(_by_rank(_rank))


# --- other packages -----------------------------------------------------------------------------------------------


@method("grace-topk", sparse=True, package="grace_dl.dist")
def _grace(model: nn.Module, density: float) -> Attached:
    """GRACE (Xu et al. 2021) with its torch.distributed package: top-k, residual memory, allgather, no DDP."""
    from grace_dl.dist.communicator.allgather import Allgather
    from grace_dl.dist.compressor.topk import TopKCompressor
    from grace_dl.dist.memory.residual import ResidualMemory

    size = dist.get_world_size()
    grace = Allgather(TopKCompressor(density), ResidualMemory(), size)

    def average() -> None:
        for name, p in model.named_parameters():
            if p.grad is not None:
                p.grad = grace.step(p.grad, name)

    pairs = sum(max(1, int(p.numel() * density)) for p in model.parameters())
    sent = (size - 1) * pairs * (4 + 8)  # float32 values, int64 positions, to every other rank
    return Attached(model, lambda step: sent, average=average)


# --- our methods --------------------------------------------------------------------------------------------------


def _sparsecomm(model: nn.Module, config: sc.SparseConfig, momentum: float = 0.9) -> Attached:
    ddp = _ddp(model)
    state = sc.SparseState(config)
    ddp.register_comm_hook(state, sc.sparse_hook)
    return Attached(
        ddp,
        lambda step: state.last_step().bytes_sent,
        counted=True,
        momentum=momentum,
        settled=state.is_settled,
    )


@method("sparsecomm-dense")
def _ours_dense(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.preset("dense"))


@method("sparsecomm-topk", sparse=True)
def _ours_topk(model: nn.Module, density: float) -> Attached:
    """Exact top-k, fp16 values, error feedback, and the sparse allgather, the best choice for few ranks."""
    return _sparsecomm(model, sc.SparseConfig(compressor=sc.TopK(density), collective="allgather"))


@method("sparsecomm-auto", sparse=True)
def _ours_auto(model: nn.Module, density: float) -> Attached:
    """`SparseState(TopK(density))`, which tries the most promising collectives and keeps the fastest."""
    return _sparsecomm(model, sc.SparseConfig(compressor=sc.TopK(density)))


@method("sparsecomm-threshold", sparse=True)
def _ours_threshold(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.SparseConfig(compressor=sc.ThresholdTopK(density), collective="allgather"))


def _by_collective(collective: str) -> Attach:
    def attach(model: nn.Module, density: float) -> Attached:
        compressor = compressor_for(collective, density)
        return _sparsecomm(model, sc.SparseConfig(compressor=compressor, collective=collective))

    return attach


@method("sparsecomm-dense-fp16", default=False)
def _ours_dense_fp16(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.preset("dense").change(value_codec="fp16"))


for _ours in methods().values():  # those without a registration above
    if _ours.needs_residual and _ours.scope != Scope.OWN and _ours.name != "allgather":
        method(f"sparsecomm-{_ours.name}", sparse=True, default=_ours.name == "split_reduce")(
            _by_collective(_ours.name)
        )


@method("sparsecomm-random", sparse=True, default=False)
def _ours_random(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.SparseConfig(compressor=sc.RandomK(density)))


@method("sparsecomm-topk-int8", sparse=True, default=False)
def _ours_topk_int8(model: nn.Module, density: float) -> Attached:
    config = sc.SparseConfig(compressor=sc.TopK(density), collective="allgather", value_codec="int8")
    return _sparsecomm(model, config)


@method("sparsecomm-ef-topk", sparse=True, default=False)
def _ours_ef_topk(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.preset("ef-topk", density=density).change(collective="allgather"))


@method("sparsecomm-oktopk", sparse=True, default=False)
def _ours_oktopk(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.preset("oktopk", density=density).change(collective="allgather"))


@method("sparsecomm-dgc", sparse=True, default=False)
def _ours_dgc(model: nn.Module, density: float) -> Attached:
    """DGC without its density warm-up, which would take longer than a bench. DGC applies the momentum itself."""
    return _sparsecomm(
        model, sc.preset("dgc", momentum=0.9).change(density=density, collective="allgather"), momentum=0.0
    )


@method("sparsecomm-sign", default=False)
def _ours_sign(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.SparseConfig(compressor=sc.Sign(), collective="sign"))


@method("sparsecomm-powersgd", default=False)
def _ours_powersgd(model: nn.Module, density: float) -> Attached:
    return _sparsecomm(model, sc.SparseConfig(compressor=sc.PowerSGD(), collective="powersgd"))
