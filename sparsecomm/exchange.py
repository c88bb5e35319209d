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
import math
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives import agree, allgather_bodies, dense_ring_bytes, ring_allreduce
from sparsecomm.compress import Bucket, Compressor, ErrorFeedback, Feedback, Taken, take_all, take_some
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


_HALF_MAX = 65504.0
_ERROR_FEEDBACK = ErrorFeedback()


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
        feedback: what happens to what is not sent; None forgets it.
        grad_scale: what gradients arrive multiplied by (a GradScaler's scale); residuals are in unscaled units.
        held: spans of parameters that this rank did not use in this step; their memory stays as it is.
        clip_norm: norm that this bucket's gradient is clipped to by momentum correction; None for none.
    """

    step: int
    collective: CollectiveKind
    compressor: Compressor
    k: int
    value_codec: ValueCodec = ValueCodec.FP32
    index_codec: IndexCodec | None = None
    feedback: Feedback | None = _ERROR_FEEDBACK
    grad_scale: float = 1.0
    held: tuple[tuple[int, int], ...] = ()
    clip_norm: float | None = None


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
    taken: Taken | None = None
    try:
        start = perf_counter()
        taken = take_some(
            bucket,
            grad,
            plan.compressor,
            plan.k,
            plan.feedback,
            arena,
            scale=1.0 / plan.grad_scale,
            held=plan.held,
            clip_norm=plan.clip_norm,
        )
        report.nnz, report.nonfinite = taken.values.numel(), taken.nonfinite
        report.select_seconds = perf_counter() - start
        header, payload, most = _encode(_blank(channel, bucket, grad, plan, report), taken, plan, arena, report)
    except Exception as error:
        if taken is not None:
            taken.undo()
        yield from report_failure(channel, _blank(channel, bucket, grad, plan, report), error, arena)
        raise  # not reached: the line above raises what all ranks now know
    try:
        start = perf_counter()
        headers = yield from agree(channel, payload, arena, bucket.index)
        if any(h.flags & FLAG_NONFINITE for h in headers):
            taken.undo()
            grad.fill_(math.nan)
            return
        mine = payload[HEADER_BYTES : HEADER_BYTES + header.body_bytes]
        lengths = [h.body_bytes for h in headers]
        bodies = yield from allgather_bodies(channel, mine, lengths, arena, bucket.index, reserve=most - HEADER_BYTES)
        report.wait_seconds = perf_counter() - start
        parts = _decode(headers, bodies, taken.capacity, arena, report)
    except BaseException:
        taken.undo()
        raise
    start = perf_counter()
    scale = plan.grad_scale / channel.size
    if grad.dtype == torch.float16:
        average = arena.get((bucket.index, "work"), grad.numel(), torch.float32)
        kernels.scatter_reduce(average, parts, scale=scale)
        _keep_if_in_range(taken, average)
    else:
        kernels.scatter_reduce(grad, parts, scale=scale)
        taken.commit()
    report.apply_seconds += perf_counter() - start


def _keep_if_in_range(taken: Taken, average: torch.Tensor) -> bool:
    """Writes the average into a float16 bucket, unless it overflows there: the optimizer then skips the step.

    All ranks hold the same average and decide alike.

    Returns:
        Whether the step is kept.
    """
    low, high = (float(x) for x in torch.aminmax(average)) if average.numel() else (0.0, 0.0)
    if not (low >= -_HALF_MAX and high <= _HALF_MAX):
        taken.undo()
        taken.grad.fill_(math.nan)
        return False
    taken.grad.copy_(average)
    taken.commit()
    return True


def _encode(
    blank: Header, taken: Taken, plan: Plan, arena: Arena, report: BucketReport
) -> tuple[Header, torch.Tensor, int]:
    """Step 3: writes the payload and gives the residual what rounding drops.

    Returns:
        The header, the payload, and the bytes that a payload may grow to when more is selected in a later step.
    """
    start = perf_counter()
    indices, values = taken.indices, taken.values
    nnz, numel = values.numel(), blank.numel
    codec = choose_index_codec(nnz, numel) if plan.index_codec is None else plan.index_codec
    most = max_payload_bytes(codec, plan.value_codec, max(nnz, taken.capacity), numel)
    payload = arena.get((blank.bucket, "payload"), most, torch.uint8)
    error = arena.get((blank.bucket, "error"), nnz, torch.float32, reserve=taken.capacity)
    header = encode_payload(replace(blank, index_codec=codec), indices, values, payload, error)
    if plan.value_codec != ValueCodec.FP32 and taken.bucket.residual is not None:
        kernels.scatter_add(taken.bucket.residual, indices, error)
    report.encode_seconds = perf_counter() - start
    return header, payload, most


def _decode(
    headers: list[Header], bodies: list[torch.Tensor], capacity: int, arena: Arena, report: BucketReport
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Step 5: decodes and checks every rank's payload; nothing is applied yet."""
    start = perf_counter()
    total, most = sum(h.nnz for h in headers), capacity * len(headers)
    indices = arena.get((report.bucket, "all indices"), total, torch.uint32, reserve=most)
    values = arena.get((report.bucket, "all values"), total, torch.float32, reserve=most)
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
    start = perf_counter()
    unscale = 1.0 / plan.grad_scale
    taken = take_all(bucket, grad, plan.feedback, arena, scale=unscale, held=plan.held, clip_norm=plan.clip_norm)
    report.nnz, report.nonfinite = numel, taken.nonfinite
    report.select_seconds = perf_counter() - start
    work, summing = grad, False
    try:
        start = perf_counter()
        payload = arena.get((bucket.index, "payload"), HEADER_BYTES, torch.uint8)
        write_header(_blank(channel, bucket, grad, plan, report), payload)
        headers = yield from agree(channel, payload, arena, bucket.index)
        if any(h.flags & FLAG_NONFINITE for h in headers):
            taken.undo()
            grad.fill_(math.nan)
            return
        if residual is not None or grad.dtype != torch.float32:
            # The gradient itself stays intact until the sum has arrived, so that a failure can be undone.
            work = arena.get((bucket.index, "work"), numel, torch.float32)
            work.copy_(grad if residual is None else residual)
        summing = True
        yield from ring_allreduce(channel, work, arena, bucket.index)
        report.wait_seconds = perf_counter() - start
    except BaseException:
        taken.undo()
        if summing and work is grad:
            grad.fill_(math.nan)  # summed in place: half a sum must not pass for a gradient
        raise
    start = perf_counter()
    work.mul_((plan.grad_scale if residual is not None else 1.0) / channel.size)
    if grad.dtype == torch.float16:
        _keep_if_in_range(taken, work)
    else:
        if work is not grad:
            grad.copy_(work)
        taken.commit()
    report.apply_seconds += perf_counter() - start


def _blank(channel: Channel, bucket: Bucket, grad: torch.Tensor, plan: Plan, report: BucketReport) -> Header:
    """Returns the header of an exchange before anything is encoded."""
    return replace(
        blank_header(channel.rank, channel.size, bucket.index, plan.step, grad.numel()),
        flags=FLAG_NONFINITE if report.nonfinite else 0,
        collective=plan.collective,
        value_codec=ValueCodec.FP32 if plan.collective == CollectiveKind.DENSE else plan.value_codec,
        layout_hash=bucket.layout.hash,
    )
