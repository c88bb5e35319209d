"""What an exchange method is, what it is given, and the registry of all methods.

A method is one way of exchanging a bucket: one file in exchange/methods/, which holds its steps, its bytes and seconds,
the header fields that ranks must share, and its registration. docs/architecture.md says how to add one.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch

from sparsecomm.errors import ConfigError
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.plan import Plan
from sparsecomm.feedback import (
    BucketMemory,
    ChunkNorms,
    Incoming,
    NothingTaken,
    PlacesTaken,
    SelectedTaken,
    Taken,
    WholeTaken,
    accumulate,
    take_all,
    take_some,
)
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.runtime.trace import Stage
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import IndexCodec, Sizes, ValueCodec
from sparsecomm.wire import (
    FLAG_NONFINITE,
    HEADER_BYTES,
    Header,
    HeaderRules,
    check_bare,
    check_pairs,
    register_rules,
    write_header,
)

__all__ = ["Exchange", "Method", "Scope", "blank_header", "method_named", "methods", "register"]


@dataclass(slots=True)
class Exchange:
    """One exchange in progress.

    Attributes:
        channel: the ranks.
        memory: the bucket's.
        grad: shape (n,); becomes the average.
        plan: how to exchange it.
        arena: gives buffers for messages, on the host.
        workspace: gives buffers on the gradient's device; on the host the same arena.
        report: what the exchange has cost so far.
    """

    channel: Channel
    memory: BucketMemory
    grad: torch.Tensor
    plan: Plan
    arena: Arena
    workspace: Arena
    report: BucketReport

    def keep(self, taken: Taken) -> None:
        """Makes an exchanged step final, or leaves that to the caller, who knows whether the optimizer takes it."""
        if self.plan.final:
            taken.commit()
        else:
            self.memory.pending = taken

    def skip(self, taken: Taken) -> None:
        """Undoes the step and makes the gradient NaN, so that all ranks skip or fail the same step."""
        taken.undo()
        self.grad.fill_(math.nan)
        self.report.skipped = 1

    def stage(self, name: str) -> Stage:
        """Returns a context whose time counts as that of a stage."""
        profiled = name != "wait" and bool(torch.autograd.profiler._is_profiler_enabled)
        return Stage(name, self.report, profiled=profiled)

    def header(self) -> Header:
        """Returns this exchange's header, without anything about its content yet."""
        number = method_named(self.plan.collective).number
        header = blank_header(
            self.channel.rank, self.channel.size, self.memory.index, self.plan.step, self.grad.numel(), number
        )
        header.layout_hash = self.memory.layout.hash
        if self.report.nonfinite:
            header.flags = FLAG_NONFINITE
        return header

    def take_some(self) -> SelectedTaken:
        """Adds the gradient and selects about k elements: steps 1 and 2 where each rank selects by itself."""
        return take_some(self.memory, self._incoming(), self.plan.compressor, self.plan.k, self.workspace)

    def take_all(self, *, exact: bool = False) -> WholeTaken | NothingTaken:
        """Adds the gradient, to be sent with all that was left over. `exact` means that nothing is rounded off."""
        return take_all(self.memory, self._incoming(), self.workspace, exact=exact)

    def take_whole(self) -> WholeTaken:
        """Adds the gradient, to be sent with all that was left over, from a residual that is not passed over."""
        taken = self.take_all()
        assert isinstance(taken, WholeTaken)
        return taken

    def accumulate(self, norms: ChunkNorms | None = None) -> PlacesTaken:
        """Adds the gradient: step 1 where ranks find together what to send. Fills `norms`."""
        return accumulate(self.memory, self._incoming(), self.workspace, norms)

    def _incoming(self) -> Incoming:
        plan = self.plan
        return Incoming(self.grad, plan.feedback, 1.0 / plan.grad_scale, plan.unused, plan.clip_norm, plan.final)


class Scope(Enum):
    """Where a method may be used."""

    GENERAL = "everywhere; `auto` considers it"
    NODES = "everywhere; `auto` considers it where several nodes have several ranks"
    COMPARISON = "everywhere, for comparison; `auto` passes it over"
    OWN = "only with compressors that name it in `Compressor.collectives`"


class Method(abc.ABC):
    """One way of exchanging a bucket. pipeline.py calls the methods below, in their order.

    Attributes:
        name: the users' name for it: collective="allgather".
        number: the headers' number for it, 1 to 255; never reused.
        has_body: whether a body follows the header, so that all ranks need all headers. Else the header holds k and a
            tag, and values travel later.
        must_match: further header fields that ranks must share, with the users' word for each.
        scope: where it may be used.
        needs_residual: whether it leaves anything over.
        on_device: whether it works on a gradient where that is. Else a gradient on a GPU is brought to the host whole.
        header: this rank's header, once encoded.
        payload: uint8: that header and what may follow it, once encoded.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    has_body: ClassVar[bool]
    must_match: ClassVar[Mapping[str, str]] = {}
    scope: ClassVar[Scope] = Scope.GENERAL
    needs_residual: ClassVar[bool] = True
    on_device: ClassVar[bool] = False
    header: Header
    payload: torch.Tensor

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    # --- bytes and seconds ----------------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def bytes_sent(cls, sizes: Sizes) -> int:
        """Returns the bytes that the busiest rank sends for a bucket, headers included, for uniform positions."""

    @classmethod
    def rounds(cls, ranks: int) -> int:
        """Returns how many times a rank waits for messages one after the other, the agreement included."""
        return 2 * (ranks - 1).bit_length()

    @classmethod
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """Returns the predicted seconds of an exchange of one bucket.

        This is for an exchange that brings every rank k nonzeros of each other rank; other methods override it.
        """
        k, n = sizes.k, sizes.numel
        compute = costs.exchange + (costs.select + costs.fill) * n + (costs.encode + costs.decode * sizes.ranks) * k
        return Estimate(costs.alpha * cls.rounds(sizes.ranks) + costs.beta * cls.bytes_sent(sizes), compute)

    # --- headers --------------------------------------------------------------------------------------------------

    @classmethod
    def header_rules(cls) -> HeaderRules:
        """Returns the rules by which receivers check this method's headers."""
        check = check_pairs if cls.has_body else check_bare
        return HeaderRules(cls.number, cls.name.upper(), check, not cls.has_body, cls.must_match, cls.show)

    @classmethod
    def show(cls, field: str, value: Any) -> str:
        """Returns a header field as users know it, for the error that says on what ranks disagree."""
        return str(getattr(value, "name", value))

    # --- the steps of an exchange ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def take(self) -> Taken:
        """Adds the gradient to the bucket's memory and takes out what is to be sent."""

    @abc.abstractmethod
    def encode(self) -> None:
        """Makes header and payload. A failure until here is told to all ranks."""

    @abc.abstractmethod
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """Exchanges. Collective.

        Returns:
            Whether the sum is finite, the same on all ranks.
        """

    def decode(self) -> None:  # noqa: B027  # most have done so while they communicated
        """Decodes and checks everything that came and was not checked yet; nothing is applied."""

    @abc.abstractmethod
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """Writes the scaled sum into a dense vector of the gradient's shape; cannot fail."""

    def finish(self) -> None:  # noqa: B027  # most have nothing to do here
        """Puts into the residual what the exchange has left with this rank; the average is in the bucket."""

    def give_up(self, *, agreed: bool) -> None:  # noqa: B027  # most have nothing to do here
        """Cleans up after an exchange without a result; what was taken has been put back.

        Args:
            agreed: whether all ranks skip the step together (NaN, infinity, an average out of range). Else the exchange
                failed half-way.
        """

    def make_bare_payload(self) -> None:
        """Makes a payload that is nothing but `header`."""
        exchange = self.exchange
        self.payload = exchange.arena.get((exchange.memory.index, "payload"), HEADER_BYTES, torch.uint8)
        write_header(self.header, self.payload)


_M = TypeVar("_M", bound=type[Method])
_REGISTERED: dict[str, type[Method]] = {}


def register(method: _M) -> _M:
    """Makes a method known by its name, and its headers readable. For use as a decorator.

    Raises:
        ConfigError: if it lacks a name, a number or `has_body`, or another method has its name or its number.
    """
    for attribute in ("name", "number", "has_body"):
        if not hasattr(method, attribute):
            raise ConfigError(f"{method.__name__} has no {attribute}")
    if method.name in _REGISTERED or any(m.number == method.number for m in _REGISTERED.values()):
        raise ConfigError(f"there is a method with the name {method.name!r} or the number {method.number} already")
    register_rules(method.header_rules())
    _REGISTERED[method.name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """Returns all methods by name."""
    return dict(_REGISTERED)


def method_named(name: str) -> type[Method]:
    """Returns the method of that name.

    Raises:
        ConfigError: if there is none.
    """
    found = _REGISTERED.get(name)
    if found is None:
        raise ConfigError(f"collective must be one of {', '.join(_REGISTERED)}, got {name!r}")
    return found


def blank_header(rank: int, world: int, bucket: int, step: int, numel: int, number: int) -> Header:
    """Returns a header that says which exchange it is and nothing of its content yet.

    Args:
        rank: this rank.
        world: number of ranks.
        bucket: bucket number.
        step: training step.
        numel: elements of the bucket.
        number: the method's.
    """
    return Header(
        flags=0,
        collective=number,
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
