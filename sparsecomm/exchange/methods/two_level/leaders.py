"""The exchange between the leaders of nodes, and the result on its way to the other ranks of each node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.compress import Compressor, Selection, SelectionBuffers, SelectorMemory
from sparsecomm.errors import CollectiveMismatch, RemoteError, WireError
from sparsecomm.exchange import pipeline
from sparsecomm.exchange.messages import receive_payload, send_payload
from sparsecomm.exchange.method import Exchange, Method
from sparsecomm.exchange.methods.allgather import Allgather
from sparsecomm.exchange.methods.split_reduce import SplitReduce
from sparsecomm.feedback import BucketMemory, ErrorFeedback
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.transport import AgreedError, CollectiveSteps
from sparsecomm.types import Codecs, Pairs, Sizes, ValueCodec
from sparsecomm.wire import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    Header,
    check_body,
    encode_error,
    read_vector,
    vector_header,
    write_vector,
)

__all__ = ["Outcome", "follow", "lead", "leaders_method"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an exchange between leaders.

    Attributes:
        pairs: sum over all nodes, divided by the number of nodes; None if it is not finite.
        chosen: uint32, ascending: positions that the leader of this node selected; None unless momentum is masked.
        rest: float32, shape (n,): the part of the node's sum that the leader did not send; None on other ranks.
        shared: object that the method of the leaders keeps for the bucket; None on other ranks.
    """

    pairs: Pairs | None
    chosen: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    shared: object = None


def leaders_method(sizes: Sizes) -> type[Method]:
    """Returns the sparse method that sends the fewest bytes between `sizes.ranks` leaders."""
    return Allgather if Allgather.bytes_sent(sizes) <= SplitReduce.bytes_sent(sizes) else SplitReduce


def lead(
    exchange: Exchange, header: Header, total: torch.Tensor, leaders: Sequence[int], node: Sequence[int]
) -> CollectiveSteps[Outcome]:
    """Exchanges the sum of this node with the other leaders, then sends the result or the failure to the node.

    Args:
        exchange: the exchange in progress.
        header: header of this rank.
        total: float32, shape (n,): sum over the node. Mutated: becomes the average over the leaders.
        leaders: ranks of the leaders, ascending.
        node: ranks of this node, this rank first.

    Raises:
        AgreedError: the exchange between the leaders failed. The other ranks of the node raise it, too.
        WireError: a payload was damaged on its way to this rank.
    """
    plan, numel, key = exchange.plan, total.numel(), exchange.memory.index
    followers = node[1:]
    rest = exchange.arena.get((key, "rest"), numel, torch.float32).zero_()
    noting = _Noting(plan.compressor)
    memory = exchange.memory
    inner = BucketMemory(key, memory.layout, rest, memory.selector, shared=memory.shared)
    chosen_method = leaders_method(Sizes(plan.k, numel, len(leaders), plan.value_codec, plan.index_codec))
    inner_plan = replace(
        plan,
        collective=chosen_method.name,
        compressor=noting,
        feedback=ErrorFeedback(),
        grad_scale=1.0,
        unused=(),
        clipping=None,
        final=True,
        inner_group=None,
    )
    channel = exchange.channel.among(leaders)
    try:
        report = yield from pipeline.exchange(channel, inner, total, inner_plan, exchange.arena)
    except AgreedError as error:
        cause = _named(error.cause, leaders)
        yield from _share_failure(exchange, header, cause, followers)
        raise AgreedError(cause) from error
    except WireError as error:
        if error.rank is not None:
            raise error.at(rank=leaders[error.rank]) from error
        raise
    _add_times(exchange.report, report)
    pairs, chosen = None, None
    if not report.skipped and bool(torch.isfinite(total).all()):  # the same on all leaders
        pairs = _nonzeros(exchange, total)
        exchange.report.nnz = report.nnz
        if plan.masking:
            chosen = noting.chosen
    outcome = Outcome(pairs, chosen, rest, inner.shared)
    yield from _share(exchange, header, outcome, followers)
    return outcome


def _nonzeros(exchange: Exchange, total: torch.Tensor) -> Pairs:
    """Returns the nonzeros of a dense vector, or all elements if that takes fewer bytes, since positions are omitted.

    Mutates `total`.
    """
    numel, arena, key = total.numel(), exchange.arena, exchange.memory.index
    nnz = int(torch.count_nonzero(total))
    if 32 * nnz + numel > 32 * numel:
        indices = arena.get("shared indices", numel, torch.uint32)
        indices.numpy()[:] = np.arange(numel, dtype=np.uint32)
        return indices, total
    indices = arena.get((key, "shared indices"), nnz, torch.uint32, reserve=2 * nnz)
    values = arena.get((key, "shared values"), nnz, torch.float32, reserve=2 * nnz)
    kernels.exact_topk(None, total, nnz, indices, values)
    return indices, values


def _share(exchange: Exchange, header: Header, outcome: Outcome, followers: Sequence[int]) -> CollectiveSteps[None]:
    """Sends the result, and the positions that the leader selected if they are needed, to the ranks of the node."""
    if not followers:
        return

    def written(pairs: Pairs | None, codec: ValueCodec, name: str) -> torch.Tensor:
        key = (exchange.memory.index, name)
        return write_vector(header, pairs, Codecs(codec), exchange.arena, key).payload

    payloads = [written(outcome.pairs, ValueCodec.FP32, "result")]
    if outcome.chosen is not None:
        # Only positions matter, but a payload cannot omit the values.
        blank = torch.zeros(outcome.chosen.numel(), dtype=torch.float32)
        payloads.append(written((outcome.chosen, blank), ValueCodec.INT8, "mask"))
    yield [r for f in followers for p in payloads for r in send_payload(exchange.channel, p, f)]


def _share_failure(
    exchange: Exchange, header: Header, cause: BaseException, followers: Sequence[int]
) -> CollectiveSteps[None]:
    """Tells the ranks of the node that the exchange between leaders failed."""
    if not followers:
        return
    room = HEADER_BYTES + MAX_ERROR_BYTES
    payload = exchange.arena.get((exchange.memory.index, "flag"), room, torch.uint8)
    told = vector_header(header)
    text = str(cause) if isinstance(cause, (RemoteError, CollectiveMismatch)) else _failed(header, cause)
    encode_error(told, text, payload)
    whole = payload[: HEADER_BYTES + told.body_bytes]
    yield [r for f in followers for r in send_payload(exchange.channel, whole, f)]


def follow(exchange: Exchange, header: Header, leader: int, *, masked: bool) -> CollectiveSteps[Outcome]:
    """Receives the result from the leader of the node.

    Args:
        exchange: the exchange in progress.
        header: header of this rank.
        leader: rank of the leader.
        masked: whether the leader also sends the positions that it selected.

    Raises:
        AgreedError: the exchange between leaders failed.
        WireError: the leader's message is damaged.
    """
    key = exchange.memory.index

    def receive(name: str) -> CollectiveSteps[tuple[Header, torch.Tensor]]:
        return receive_payload(exchange.channel, leader, header, exchange.arena, (key, name))

    result, payload = yield from receive("result")
    body = payload[HEADER_BYTES:]
    if result.flags & FLAG_ERROR:
        check_body(result, body)
        raise AgreedError(RemoteError(bytes(body.numpy()).decode("utf-8", "replace")))
    if result.flags & FLAG_NONFINITE:
        return Outcome(None)
    pairs = read_vector(result, payload, exchange.arena, (key, "result"))
    if not masked:
        return Outcome(pairs)
    mask, payload = yield from receive("mask")
    chosen, _ = read_vector(mask, payload, exchange.arena, (key, "mask"))
    return Outcome(pairs, chosen)


class _Noting(Compressor):
    """Wraps a compressor and records the positions of its last selection, valid until the bucket's next exchange."""

    def __init__(self, other: Compressor) -> None:
        self._other = other
        self.chosen = torch.empty(0, dtype=torch.uint32)

    @override
    def density_at(self, step: int) -> float:
        return self._other.density_at(step)

    @override
    def capacity(self, k: int, numel: int) -> int:
        return self._other.capacity(k, numel)

    @override
    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        selection = self._other.select(grad, residual, k, memory, out, scale=scale)
        self.chosen = out.indices[: selection.nnz]
        return selection


def _failed(header: Header, cause: BaseException) -> str:
    kind = type(cause).__name__
    return f"rank {header.rank} failed in bucket {header.bucket} of step {header.step}: {kind}: {cause}"


def _named(cause: BaseException, leaders: Sequence[int]) -> BaseException:
    """Returns an agreed failure of the leaders, with a note on how its message numbers ranks."""
    if isinstance(cause, (RemoteError, CollectiveMismatch)):
        return type(cause)(f"between the leaders of nodes, ranks {list(leaders)}, there numbered from 0: {cause}")
    return cause


def _add_times(whole: BucketReport, part: BucketReport) -> None:
    """Adds the stages of the leaders' exchange to the report and removes their seconds from the time of waiting."""
    for name in ("select_seconds", "encode_seconds", "apply_seconds"):
        seconds = getattr(part, name)
        setattr(whole, name, getattr(whole, name) + seconds)
        whole.wait_seconds -= seconds
