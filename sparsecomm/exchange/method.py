"""What a strategy is, what it is given, and the registry of all."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from sparsecomm.compress import Compressor, TopK
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.plan import Plan
from sparsecomm.feedback import BucketMemory, ChunkNorms, Taken, accumulate, take_all, take_some
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.runtime.trace import Stage
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import FLAG_NONFINITE, HEADER_BYTES, CollectiveKind, Header, write_header

__all__ = ["Job", "Strategy", "blank_header", "dense_wire", "register", "strategies", "strategy_named", "strategy_of"]


@dataclass(slots=True)
class Job:
    """One exchange in progress: what `exchange` was given, its report, and `exchange` for a part of the ranks."""

    channel: Channel
    bucket: BucketMemory
    grad: torch.Tensor
    plan: Plan
    arena: Arena
    report: BucketReport
    settle: bool
    exchange: Callable[[Channel, BucketMemory, torch.Tensor, Plan, Arena], CollectiveSteps[BucketReport]]
    memory: Arena
    """Where work buffers on the gradient's device come from; those of messages, from `arena`, are on the host."""

    def keep(self, taken: Taken) -> None:
        """The step is exchanged: makes it final, or leaves that to whoever knows whether the optimizer takes it."""
        if self.settle:
            taken.commit()
        else:
            self.bucket.unsettled = taken

    def skip(self, taken: Taken) -> None:
        """Some rank saw NaN or infinity, or the average is out of range: undoes the step, visibly on all ranks."""
        taken.undo()
        self.grad.fill_(math.nan)
        self.report.skipped = 1

    def stage(self, name: str) -> Stage:
        """Returns a context whose time counts as that of a stage."""
        return Stage(name, self.report, profiled=self.plan.profiled and name != "wait")

    def header(self) -> Header:
        """Returns this exchange's header, nothing of the content in it yet."""
        plan = self.plan
        header = blank_header(
            self.channel.rank, self.channel.size, self.bucket.index, plan.step, self.grad.numel(), plan.collective
        )
        header.layout_hash = self.bucket.layout.hash
        if self.report.nonfinite:
            header.flags = FLAG_NONFINITE
        return header

    def take_some(self) -> Taken:
        """Selects about k elements: steps 1 and 2 of every sparse strategy whose ranks select by themselves."""
        plan = self.plan
        return take_some(self.bucket, self.grad, plan.compressor, plan.k, plan.feedback, self.memory, **self._adding())

    def take_all(self, *, exact: bool = False) -> Taken:
        """Adds the gradient, to be sent with all that was left over: a dense strategy's steps 1 and 2."""
        return take_all(self.bucket, self.grad, self.plan.feedback, self.memory, exact=exact, **self._adding())

    def accumulate(self, norms: ChunkNorms | None = None) -> Taken:
        """Adds the gradient: step 1 of a strategy whose ranks find out together what to send. `norms` is written."""
        return accumulate(self.bucket, self.grad, self.plan.feedback, self.memory, norms=norms, **self._adding())

    def _adding(self) -> dict[str, Any]:
        """How the gradient is added to the bucket's memory."""
        plan = self.plan
        return {
            "scale": 1.0 / plan.grad_scale,
            "held": plan.held,
            "clip_norm": plan.clip_norm,
            "lasting": self.settle,
        }


class Strategy(abc.ABC):
    """One bucket's exchange by one collective. `exchange` calls the methods below, in their order.

    Attributes:
        name: what users call it.
        kind: what headers call it.
        needs_residual: whether it leaves anything over.
        gathers_headers: whether it needs every rank's header.
        special: whether it exchanges only what compressors that name it (`Compressor.collectives`) make.
        on_device: whether it works on a gradient where that is; else a gradient on a GPU is brought to the host whole.
        competes: whether `collective="auto"` considers it; else it is there for comparison.
        layered: whether it makes sense only where several nodes have several ranks.
        header: this rank's, once encoded.
        payload: uint8, that header and what may follow it, once encoded.
    """

    name: ClassVar[str]
    kind: ClassVar[CollectiveKind]
    needs_residual: ClassVar[bool] = True
    gathers_headers: ClassVar[bool] = False
    special: ClassVar[bool] = False
    on_device: ClassVar[bool] = False
    competes: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    header: Header
    payload: torch.Tensor

    def __init__(self, job: Job) -> None:
        self.job = job

    @classmethod
    @abc.abstractmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """Returns the bytes that a rank is expected to send for a bucket, headers included.

        Args:
            k: nonzeros it selects.
            numel: elements of the bucket.
            size: number of ranks.
            value_codec: how values are written.
            index_codec: how indices are written; None for the smallest.
        """

    @classmethod
    def compressor_at(cls, density: float) -> Compressor:
        """Returns a compressor of this density whose selections it can exchange: what benches pair it with."""
        return TopK(density)

    @classmethod
    def rounds(cls, size: int) -> int:
        """Returns how many times a rank waits for messages one after the other, the agreement included."""
        return 2 * (size - 1).bit_length()

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """Returns the expected seconds of an exchange of one bucket. Arguments as in `estimate_bytes`.

        Here for a sparse exchange that brings every rank k nonzeros of each; others override it.
        """
        sent = cls.estimate_bytes(k, numel, size, value_codec, index_codec)
        compute = costs.exchange + (costs.select + costs.fill) * numel + (costs.encode + costs.decode * size) * k
        return Estimate(costs.alpha * cls.rounds(size) + costs.beta * sent, compute)

    @abc.abstractmethod
    def take(self) -> Taken:
        """Adds the gradient to the bucket's memory and takes out what is to be sent."""

    @abc.abstractmethod
    def encode(self, taken: Taken) -> None:
        """Makes header and payload. A failure until here is told to all ranks."""

    @abc.abstractmethod
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """Exchanges.

        Returns:
            Whether the sum is finite, the same on all ranks.
        """

    def decode(self) -> None:  # noqa: B027  # most have done so while they communicated
        """Decodes and checks whatever came and has not been yet; nothing is applied."""

    @abc.abstractmethod
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """Writes the scaled sum into a dense vector of the gradient's shape; cannot fail."""

    def settle(self) -> None:  # noqa: B027  # most have nothing to do here
        """Puts into the residual what the exchange has left with this rank; the average is in the bucket."""

    def skipped(self) -> None:  # noqa: B027  # most have nothing to do here
        """The step was not taken, by agreement: NaN or infinity, or an average out of range."""

    def interrupted(self) -> None:  # noqa: B027  # most have nothing to do here
        """Half-way through the exchange failed; what was taken has been put back."""

    def bare_payload(self) -> None:
        """Makes a payload that is nothing but `header`."""
        self.payload = self.job.arena.get((self.job.bucket.index, "payload"), HEADER_BYTES, torch.uint8)
        write_header(self.header, self.payload)


_S = TypeVar("_S", bound=type[Strategy])
_REGISTERED: dict[CollectiveKind, type[Strategy]] = {}


def register(strategy: _S) -> _S:
    """Makes a strategy known by its name and its kind. For use as a decorator."""
    _REGISTERED[strategy.kind] = strategy
    return strategy


def strategies() -> dict[str, type[Strategy]]:
    """Returns all strategies by name."""
    return {s.name: s for s in _REGISTERED.values()}


def strategy_of(kind: CollectiveKind) -> type[Strategy]:
    """Returns the strategy of a kind of collective."""
    return _REGISTERED[kind]


def strategy_named(name: str) -> type[Strategy]:
    """Returns the strategy of that name.

    Raises:
        ConfigError: if there is none.
    """
    known = strategies()
    if name not in known:
        raise ConfigError(f"collective must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def dense_wire(codec: ValueCodec) -> ValueCodec:
    """Returns how values travel that are summed on their way: int8 numbers with a scale a block cannot be."""
    return ValueCodec.FP16 if codec == ValueCodec.INT8 else codec


def blank_header(
    rank: int, world: int, bucket: int, step: int, numel: int, collective: CollectiveKind = CollectiveKind.DENSE
) -> Header:
    """Returns a header that says which exchange it is and nothing of its content yet."""
    return Header(
        flags=0,
        collective=collective,
        value_codec=ValueCodec.FP32,
        index_codec=IndexCodec.RAW,
        rank=rank,
        world=world,
        bucket=bucket,
        step=step,
        layout_hash=0,
        numel=numel,
        nnz=0,
        index_bytes=0,
        value_bytes=0,
    )
