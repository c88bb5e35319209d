"""Exchange methods: the base class, its input, and the registry.

A method is one way of exchanging a bucket. It is a file in exchange/methods/, or a module of yours: a subclass of
`Method` under `@register`. pipeline.py calls its steps in this order:

    take            adds the gradient to the memory and returns a `Taken` (below); before it raises, it undoes that
    encode          sets `header` (from `Exchange.header`) and `payload` (`make_bare_payload` if there is no body). It
                    may change the residual where the `Taken` overwrites it when it is undone, and nowhere else
    [agree]         the pipeline lets all ranks compare headers
    communicate     sends and receives through `exchange.channel`; the residual stays as it is
    decode          checks everything that was received; nothing has been applied so far
    write_average   must not raise. Buffers that all buckets share are good until here
    finish          adds rounding and dropped sums to the residual
    give_up         in place of the last two, if the step is skipped or an error has ended the exchange

`Exchange.take_some` selects on each rank by itself (SelectedTaken). `take_all` and `take_whole` send the whole
residual; the method sets `rest` to the part that stays (WholeTaken). `accumulate` adds the gradient and leaves it to
the method to find common places; the method sets `places` and `rounding` (PlacesTaken).

Numbers from 1 to 99 belong to this package, those from 100 to 255 to methods from outside. `Scope.GENERAL` makes the
method a candidate of `auto`, which then relies on `seconds`. docs/wire-format.md lists the numbers.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch.autograd import profiler

from sparsecomm.errors import ConfigError
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.plan import Plan
from sparsecomm.feedback import (
    BucketMemory,
    ChunkNorms,
    GradientTaken,
    Incoming,
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
        channel: connection to the other ranks.
        memory: memory of the bucket.
        grad: shape (n,); becomes the average.
        plan: method and options of this exchange.
        arena: allocates message buffers on the host.
        workspace: allocates buffers on the gradient's device; the same object as `arena` for a gradient on the host.
        report: costs of the exchange so far.
    """

    channel: Channel
    memory: BucketMemory
    grad: torch.Tensor
    plan: Plan
    arena: Arena
    workspace: Arena
    report: BucketReport

    def keep(self, taken: Taken) -> None:
        """Commits an exchanged step, or stores it as pending if the optimizer may still skip it."""
        if self.plan.final:
            taken.commit()
        else:
            self.memory.pending = taken

    def skip(self, taken: Taken) -> None:
        """Undoes the step and fills the gradient with NaN, so that every rank skips the same step."""
        taken.undo()
        self.grad.fill_(math.nan)
        self.report.skipped = 1

    def stage(self, name: str) -> Stage:
        """Returns a context manager that adds its duration to a stage of the report."""
        profiled = name != "wait" and bool(profiler._is_profiler_enabled)
        return Stage(name, self.report, profiled=profiled)

    def header(self) -> Header:
        """Returns a header that identifies this exchange; codecs, nnz and lengths are still blank."""
        number = method_named(self.plan.collective).number
        header = blank_header(
            self.channel.rank, self.channel.size, self.memory.index, self.plan.step, self.grad.numel(), number
        )
        header.layout_hash = self.memory.layout.hash
        if self.report.nonfinite:
            header.flags = FLAG_NONFINITE
        return header

    def take_some(self) -> SelectedTaken:
        """Adds the gradient to the residual and takes about k elements that this rank selects."""
        return take_some(self.memory, self._incoming(), self.plan.compressor, self.plan.k, self.workspace)

    def take_all(self, *, exact: bool = False) -> WholeTaken | GradientTaken:
        """Adds the gradient to the residual and takes the whole residual, or the gradient alone.

        Args:
            exact: whether values are sent without rounding. Then a residual that is zero is bypassed, and the gradient
                is summed in place.
        """
        return take_all(self.memory, self._incoming(), self.workspace, exact=exact)

    def take_whole(self) -> WholeTaken:
        """Adds the gradient to the residual and takes the whole residual, which is never bypassed."""
        taken = self.take_all()
        assert isinstance(taken, WholeTaken)
        return taken

    def accumulate(self, norms: ChunkNorms | None = None) -> PlacesTaken:
        """Adds the gradient to the residual, before all ranks find common places to send. Fills `norms`."""
        return accumulate(self.memory, self._incoming(), self.workspace, norms)

    def _incoming(self) -> Incoming:
        plan = self.plan
        return Incoming(self.grad, plan.feedback, 1.0 / plan.grad_scale, plan.unused, plan.clipping, plan.final)


class Scope(Enum):
    """Where a method may be used."""

    GENERAL = "with any compressor; a candidate of `auto`"
    NODES = "with any compressor; a candidate of `auto` if several nodes have several ranks"
    COMPARISON = "with any compressor, for comparison; never a candidate of `auto`"
    OWN = "only with compressors that name it in `Compressor.collectives`"


class Method(abc.ABC):
    """One way of exchanging a bucket.

    Attributes:
        name: name for users, as in collective="allgather".
        number: number in headers, 1 to 255; never reused.
        has_body: whether a body follows the header. Every rank then needs all headers, since they hold the lengths of
            the bodies. Otherwise the header may hold k (in `nnz`) and a tag, and values follow in later messages.
        must_match: further header fields that must be the same on all ranks, with the users' word for each.
        scope: compressors that it works with, and whether `auto` considers it.
        needs_residual: whether `take` works on a residual whatever the options are.
        compresses: whether it sends less than all elements, so that some of them wait.
        on_device: whether it accepts a gradient on a GPU. Otherwise the whole gradient is copied to the host first.
        header: this rank's header; set by `encode`.
        payload: uint8, the header and the body, if any; set by `encode`.
        finite: whether the sum is finite, alike on all ranks; set by `decode`. If not, all ranks skip the step.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    has_body: ClassVar[bool]
    must_match: ClassVar[Mapping[str, str]] = {}
    scope: ClassVar[Scope] = Scope.GENERAL
    needs_residual: ClassVar[bool] = True
    compresses: ClassVar[bool] = True
    on_device: ClassVar[bool] = False
    header: Header
    payload: torch.Tensor
    finite: bool = True

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    # --- bytes and seconds ----------------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def bytes_sent(cls, sizes: Sizes) -> int:
        """Returns the bytes that the busiest rank sends for a bucket, headers included, if positions are uniform."""

    @classmethod
    def rounds(cls, ranks: int) -> int:
        """Returns how many times in a row a rank waits for messages, including the agreement."""
        return 2 * (ranks - 1).bit_length()

    @classmethod
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """Returns the predicted seconds of an exchange of one bucket.

        The default is right for a method in which every rank receives k nonzeros from each other rank.
        """
        k, n = sizes.k, sizes.numel
        compute = costs.exchange + (costs.select + costs.fill) * n + (costs.encode + costs.decode * sizes.ranks) * k
        return Estimate(costs.alpha * cls.rounds(sizes.ranks) + costs.beta * cls.bytes_sent(sizes), compute)

    # --- headers --------------------------------------------------------------------------------------------------

    @classmethod
    def header_rules(cls) -> HeaderRules:
        """Returns the rules with which receivers check this method's headers."""
        check = check_pairs if cls.has_body else check_bare
        return HeaderRules(cls.number, cls.name.upper(), check, not cls.has_body, cls.must_match, cls.show)

    @classmethod
    def show(cls, field: str, value: Any) -> str:
        """Returns the value of a header field in the users' words, for the error about a disagreement of ranks."""
        return str(getattr(value, "name", value))

    # --- the steps of an exchange ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def take(self) -> Taken:
        """Adds the gradient to the bucket's memory and takes out the elements to send."""

    @abc.abstractmethod
    def encode(self) -> None:
        """Sets `header` and `payload`. A failure in `take` or `encode` is reported to all ranks."""

    @abc.abstractmethod
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """Exchanges messages with the other ranks. Collective.

        Args:
            agreement: result of the agreement, in which no rank reported NaN, infinity or an error.

        Returns:
            Whether the sum is finite; the same on all ranks.
        """

    def decode(self) -> None:  # noqa: B027  # most methods decode while they communicate
        """Decodes and checks all messages that `communicate` has not checked. Applies nothing."""

    @abc.abstractmethod
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """Writes the sum, times `scale`, into a dense vector of the gradient's shape.

        Must not raise, because other ranks may have applied the average by now.
        """

    def finish(self) -> None:  # noqa: B027  # optional
        """Adds to the residual what this rank rounded off or dropped, unless an earlier step did so."""

    def give_up(self, *, together: bool) -> None:  # noqa: B027  # optional
        """Cleans up after an exchange without a result. The step has been undone already.

        Args:
            together: whether all ranks skip the step, because of NaN, infinity or an average out of range. Otherwise an
                error has ended the exchange.
        """

    def make_bare_payload(self) -> None:
        """Sets `payload` to the bytes of `header` alone."""
        exchange = self.exchange
        self.payload = exchange.arena.get((exchange.memory.index, "payload"), HEADER_BYTES, torch.uint8)
        write_header(self.header, self.payload)


_M = TypeVar("_M", bound=type[Method])
_REGISTERED: dict[str, type[Method]] = {}


def register(method: _M) -> _M:
    """Registers a method and the rules of its headers. Used as a decorator.

    Raises:
        ConfigError: the method lacks a name, a number or `has_body`, its number is not in 1 to 255, or another method
            has the same name or number.
    """
    for attribute in ("name", "number", "has_body"):
        if not hasattr(method, attribute):
            raise ConfigError(f"{method.__name__} has no {attribute}")
    if method.name in _REGISTERED or any(m.number == method.number for m in _REGISTERED.values()):
        raise ConfigError(f"another method has the name {method.name!r} or the number {method.number}")
    register_rules(method.header_rules())
    _REGISTERED[method.name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """Returns all methods by name."""
    return dict(_REGISTERED)


def method_named(name: str) -> type[Method]:
    """Returns the method of that name.

    Raises:
        ConfigError: no method has that name.
    """
    found = _REGISTERED.get(name)
    if found is None:
        raise ConfigError(f"collective must be one of {', '.join(_REGISTERED)}, got {name!r}")
    return found


def blank_header(rank: int, world: int, bucket: int, step: int, numel: int, number: int) -> Header:
    """Returns a header that identifies an exchange, with everything about its content still blank.

    Args:
        rank: this rank.
        world: number of ranks.
        bucket: bucket number.
        step: training step.
        numel: elements of the bucket.
        number: number of the method.
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
