"""The pipeline of one bucket: accumulate, select, encode, exchange, decode, apply. Read this first.

    1 accumulate   acc = residual + grad                       (one fused pass over memory with 2)
    2 select       indices and values of about the k largest; the residual keeps the others
    3 encode       header + packed indices + packed values; what packing the values rounds off goes to the residual
    4 exchange     headers first, so that all ranks find out together whether they agree; then the bodies
    5 decode       every payload is checked whole before anything is applied
    6 apply        sum in rank order, times 1/P, into the bucket

A failure at any point leaves the residual as it was before the step (to rounding), and the bucket untouched or, if
some rank saw NaN or infinity, NaN on every rank.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives import agree, allgather_bodies, dense_ring_bytes, ring_allreduce
from sparsecomm.compress import BucketLayout, Compressor, SelectionBuffers, roll_back
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.metrics import BucketReport
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import (
    FLAG_NONFINITE,
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    CollectiveKind,
    Header,
    choose_index_codec,
    decode_body,
    encode_error,
    encode_payload,
    max_payload_bytes,
    write_header,
)

__all__ = ["Bucket", "Plan", "blank_header", "exchange", "report_failure"]


_Pairs = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class Bucket:
    """What one bucket keeps from step to step.

    Attributes:
        index: bucket number, the same on all ranks.
        layout: the parameters in it.
        residual: float32, shape (layout.numel,); None where every exchange is dense and nothing is ever left over.
        memory: the compressor's.
    """

    index: int
    layout: BucketLayout
    residual: torch.Tensor | None = None
    memory: SelectorMemory = field(default_factory=SelectorMemory)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one bucket is exchanged in one step; decided before it starts.

    Attributes:
        step: training step.
        collective: which collective; must be the same on all ranks.
        compressor: selects.
        k: nonzeros to select.
        value_codec: how values are written.
        index_codec: how indices are written; None for the smallest.
        feedback: whether what is not sent is kept.
    """

    step: int
    collective: CollectiveKind
    compressor: Compressor
    k: int
    value_codec: ValueCodec = ValueCodec.FP32
    index_codec: IndexCodec | None = None
    feedback: bool = True


def exchange(
    channel: Channel, bucket: Bucket, grad: torch.Tensor, plan: Plan, arena: Arena
) -> CollectiveSteps[BucketReport]:
    """Averages a gradient bucket over all ranks, sparsely or densely. Collective.

    Args:
        channel: the ranks.
        bucket: Mutated: the residual and the compressor's memory.
        grad: shape (n,), float32, float16 or bfloat16, contiguous, not divided by P. Mutated: becomes the average.
        plan: what to do.
        arena: gives all work buffers.

    Returns:
        What it cost.

    Raises:
        AgreedError: on every rank alike, after a failure that all know of.
        WireError: a payload was damaged on its way to this rank.
        TransportError: the transport failed.
    """
    report = BucketReport(bucket=bucket.index, step=plan.step, numel=grad.numel())
    report.dense_bytes = dense_ring_bytes(grad.numel(), channel.size)
    if plan.collective == CollectiveKind.DENSE:
        yield from _exchange_dense(channel, bucket, grad, plan, arena, report)
    else:
        yield from _exchange_sparse(channel, bucket, grad, plan, arena, report)
    report.bytes_sent = channel.traffic.bytes_sent
    report.bytes_received = channel.traffic.bytes_received
    return report


def report_failure(channel: Channel, header: Header, cause: BaseException, arena: Arena) -> CollectiveSteps[None]:
    """Takes part in an exchange only to tell the other ranks that this one failed. Collective.

    Args:
        channel: the ranks.
        header: says which exchange.
        cause: what went wrong on this rank.
        arena: gives the buffers.

    Raises:
        AgreedError: always; its cause is this rank's own.
    """
    payload = arena.get((header.bucket, "failure"), HEADER_BYTES + MAX_ERROR_BYTES, torch.uint8)
    encode_error(header, f"{type(cause).__name__}: {cause}", payload)
    with contextlib.suppress(AgreedError):
        yield from agree(channel, payload, arena, header.bucket)
    raise AgreedError(cause)


def blank_header(rank: int, world: int, bucket: int, step: int, numel: int) -> Header:
    """Returns a header that says which exchange it is and nothing of its content yet."""
    return Header(
        flags=0,
        collective=CollectiveKind.DENSE,
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


def _exchange_sparse(
    channel: Channel, bucket: Bucket, grad: torch.Tensor, plan: Plan, arena: Arena, report: BucketReport
) -> CollectiveSteps[None]:
    residual = bucket.residual
    assert residual is not None, "a sparse exchange needs a residual"
    sent: _Pairs | None = None
    try:
        sent = _select(bucket, grad, residual, plan, arena, report)
        header, payload = _encode(_blank(channel, bucket, grad, plan, report), sent, residual, plan, arena, report)
    except Exception as error:
        if sent is not None:
            roll_back(grad, residual, *sent)
        yield from report_failure(channel, _blank(channel, bucket, grad, plan, report), error, arena)
        raise  # not reached: the line above raises what all ranks now know
    try:
        start = perf_counter()
        headers = yield from agree(channel, payload, arena, bucket.index)
        if any(h.flags & FLAG_NONFINITE for h in headers):
            roll_back(grad, residual, *sent)
            grad.fill_(float("nan"))
            return
        mine = payload[HEADER_BYTES : HEADER_BYTES + header.body_bytes]
        bodies = yield from allgather_bodies(channel, mine, [h.body_bytes for h in headers], arena, bucket.index)
        report.wait_seconds = perf_counter() - start
        parts = _decode(headers, bodies, bucket.index, arena, report)
    except BaseException:
        roll_back(grad, residual, *sent)
        raise
    start = perf_counter()
    kernels.scatter_reduce(grad, parts, scale=1.0 / channel.size)
    report.apply_seconds += perf_counter() - start


def _select(
    bucket: Bucket, grad: torch.Tensor, residual: torch.Tensor, plan: Plan, arena: Arena, report: BucketReport
) -> _Pairs:
    """Steps 1 and 2. Returns the indices and accumulated values taken out of the residual."""
    start = perf_counter()
    if not plan.feedback:
        residual.zero_()
    capacity = plan.compressor.capacity(plan.k, grad.numel())
    out = SelectionBuffers(
        indices=arena.get((bucket.index, "indices"), capacity, torch.uint32),
        values=arena.get((bucket.index, "values"), capacity, torch.float32),
    )
    selection = plan.compressor.select(grad, residual, plan.k, bucket.memory, out)
    report.nnz, report.nonfinite = selection.nnz, selection.nonfinite
    report.select_seconds = perf_counter() - start
    return out.indices[: selection.nnz], out.values[: selection.nnz]


def _encode(
    blank: Header, sent: _Pairs, residual: torch.Tensor, plan: Plan, arena: Arena, report: BucketReport
) -> tuple[Header, torch.Tensor]:
    """Step 3: writes the payload and gives the residual what rounding drops."""
    start = perf_counter()
    indices, values = sent
    nnz, numel = values.numel(), blank.numel
    codec = choose_index_codec(nnz, numel) if plan.index_codec is None else plan.index_codec
    most = max_payload_bytes(codec, plan.value_codec, nnz, numel)
    payload = arena.get((blank.bucket, "payload"), most, torch.uint8)
    error = arena.get((blank.bucket, "error"), nnz, torch.float32)
    header = encode_payload(replace(blank, index_codec=codec), indices, values, payload, error)
    if plan.feedback and plan.value_codec != ValueCodec.FP32:
        kernels.scatter_add(residual, indices, error)
    report.encode_seconds = perf_counter() - start
    return header, payload


def _decode(
    headers: list[Header], bodies: list[torch.Tensor], bucket: int, arena: Arena, report: BucketReport
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Step 5: decodes and checks every rank's payload; nothing is applied yet."""
    start = perf_counter()
    total = sum(h.nnz for h in headers)
    indices = arena.get((bucket, "all indices"), total, torch.uint32)
    values = arena.get((bucket, "all values"), total, torch.float32)
    parts, offset = [], 0
    for header, body in zip(headers, bodies, strict=True):
        part = (indices[offset : offset + header.nnz], values[offset : offset + header.nnz])
        decode_body(header, body, *part)
        parts.append(part)
        offset += header.nnz
    report.apply_seconds = perf_counter() - start
    return parts


def _exchange_dense(
    channel: Channel, bucket: Bucket, grad: torch.Tensor, plan: Plan, arena: Arena, report: BucketReport
) -> CollectiveSteps[None]:
    """Sends everything, the residual included, as float32 around a ring."""
    residual, numel = bucket.residual, grad.numel()
    report.nnz = numel
    start = perf_counter()
    if residual is not None:
        report.nonfinite = kernels.accumulate_dense(grad, residual)
    report.select_seconds = perf_counter() - start
    nothing = torch.empty(0, dtype=torch.uint32), torch.empty(0, dtype=torch.float32)
    try:
        start = perf_counter()
        payload = arena.get((bucket.index, "payload"), HEADER_BYTES, torch.uint8)
        write_header(_blank(channel, bucket, grad, plan, report), payload)
        headers = yield from agree(channel, payload, arena, bucket.index)
        if any(h.flags & FLAG_NONFINITE for h in headers):
            if residual is not None:
                roll_back(grad, residual, *nothing)
            grad.fill_(float("nan"))
            return
        work = grad
        if residual is not None or grad.dtype != torch.float32:
            # The gradient itself stays intact until the sum has arrived, so that a failure can be undone.
            work = arena.get((bucket.index, "work"), numel, torch.float32)
            work.copy_(grad if residual is None else residual)
        yield from ring_allreduce(channel, work, arena, bucket.index)
        report.wait_seconds = perf_counter() - start
    except BaseException:
        if residual is not None:
            roll_back(grad, residual, *nothing)
        raise
    start = perf_counter()
    if channel.size > 1:
        work.mul_(1.0 / channel.size)
    if work is not grad:
        grad.copy_(work)
    if residual is not None:
        residual.zero_()
    report.apply_seconds = perf_counter() - start


def _blank(channel: Channel, bucket: Bucket, grad: torch.Tensor, plan: Plan, report: BucketReport) -> Header:
    """Returns the header of an exchange before anything is encoded."""
    return replace(
        blank_header(channel.rank, channel.size, bucket.index, plan.step, grad.numel()),
        flags=FLAG_NONFINITE if report.nonfinite else 0,
        collective=plan.collective,
        value_codec=ValueCodec.FP32 if plan.collective == CollectiveKind.DENSE else plan.value_codec,
        layout_hash=bucket.layout.hash,
    )
