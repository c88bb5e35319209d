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
from dataclasses import dataclass

import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives import agree, allgather_bodies, dense_allreduce, dense_ring_bytes
from sparsecomm.compress import Bucket, Compressor, ErrorFeedback, Feedback, Taken, take_all, take_some
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.metrics import BucketReport
from sparsecomm.trace import Stage
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
        profiled: whether torch.profiler is running.
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
    profiled: bool = False


@dataclass(slots=True)
class _Job:
    """One exchange in progress: what `exchange` was given, and its report."""

    channel: Channel
    bucket: Bucket
    grad: torch.Tensor
    plan: Plan
    arena: Arena
    report: BucketReport
    settle: bool = True

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


def exchange(
    channel: Channel, bucket: Bucket, grad: torch.Tensor, plan: Plan, arena: Arena, *, settle: bool = True
) -> CollectiveSteps[BucketReport]:
    """Averages a gradient bucket over all ranks, sparsely or densely. Collective.

    Args:
        channel: the ranks.
        bucket: Mutated: the residual and the compressor's memory.
        grad: shape (n,), float32, float16 or bfloat16, contiguous, not divided by P. Mutated: becomes the average.
        plan: what to do.
        arena: gives all work buffers.
        settle: whether the step is final once this bucket is exchanged; else the caller calls `Bucket.settle` when it
            knows whether the optimizer takes the whole step.

    Returns:
        What it cost.

    Raises:
        AgreedError: on every rank alike, after a failure that all know of.
        WireError: a payload was damaged on its way to this rank.
        TransportError: the transport failed.
    """
    report = BucketReport(bucket=bucket.index, step=plan.step, numel=grad.numel())
    report.dense_bytes = dense_ring_bytes(grad.numel(), channel.size)
    job = _Job(channel, bucket, grad, plan, arena, report, settle)
    bucket.settle()
    if plan.collective == CollectiveKind.DENSE:
        yield from _exchange_dense(job)
    else:
        yield from _exchange_sparse(job)
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
        yield from agree(channel, header, payload, arena, header.bucket)
    raise AgreedError(cause)


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


def _exchange_sparse(job: _Job) -> CollectiveSteps[None]:
    channel, grad, plan, arena, report = job.channel, job.grad, job.plan, job.arena, job.report
    taken: Taken | None = None
    try:
        with job.stage("select"):
            taken = take_some(
                job.bucket,
                grad,
                plan.compressor,
                plan.k,
                plan.feedback,
                arena,
                scale=1.0 / plan.grad_scale,
                held=plan.held,
                clip_norm=plan.clip_norm,
                lasting=job.settle,
            )
            report.nnz, report.nonfinite = taken.values.numel(), taken.nonfinite
        with job.stage("encode"):
            header, payload, most = _encode(job, taken)
    except Exception as error:
        if taken is not None:
            taken.undo()
        yield from report_failure(channel, job.header(), error, arena)
        raise  # not reached: the line above raises what all ranks now know
    try:
        with job.stage("wait"):
            headers = yield from agree(channel, header, payload, arena, job.bucket.index)
            if any(h.flags & FLAG_NONFINITE for h in headers):
                job.skip(taken)
                return
            mine = payload[HEADER_BYTES : HEADER_BYTES + header.body_bytes]
            lengths = [h.body_bytes for h in headers]
            reserve = most - HEADER_BYTES
            bodies = yield from allgather_bodies(channel, mine, lengths, arena, job.bucket.index, reserve=reserve)
        with job.stage("apply"):
            parts = _decode(job, headers, bodies, taken)
    except BaseException:
        taken.undo()
        raise
    with job.stage("apply"):
        scale = plan.grad_scale / channel.size
        if grad.dtype == torch.float16:
            average = arena.get((job.bucket.index, "work"), grad.numel(), torch.float32)
            kernels.scatter_reduce(average, parts, scale=scale)
            _keep_if_in_range(job, taken, average)
        else:
            kernels.scatter_reduce(grad, parts, scale=scale)
            job.keep(taken)


def _encode(job: _Job, taken: Taken) -> tuple[Header, torch.Tensor, int]:
    """Step 3: writes the payload and gives the residual what rounding drops.

    Returns:
        The header, the payload, and the bytes that a payload may grow to when more is selected in a later step.
    """
    plan, arena, bucket = job.plan, job.arena, job.bucket
    nnz, numel = taken.values.numel(), job.grad.numel()
    header = job.header()
    header.value_codec = plan.value_codec
    header.index_codec = choose_index_codec(nnz, numel) if plan.index_codec is None else plan.index_codec
    # Index bytes need not grow with nnz (no gaps are left when all is sent), so both ends are asked.
    sizes = (nnz, max(nnz, taken.capacity))
    most = max(max_payload_bytes(header.index_codec, plan.value_codec, size, numel) for size in sizes)
    payload = arena.get((bucket.index, "payload"), most, torch.uint8)
    error = arena.get(
        "rounding", nnz, torch.float32, reserve=taken.capacity
    )  # free again at once: all buckets share it
    encode_payload(header, taken.indices, taken.values, payload, error)
    if plan.value_codec != ValueCodec.FP32 and bucket.residual is not None:
        kernels.scatter_add(bucket.residual, taken.indices, error)
    return header, payload, most


def _decode(job: _Job, headers: list[Header], bodies: list[torch.Tensor], taken: Taken) -> list[_Pairs]:
    """Step 5: decodes and checks every rank's payload; nothing is applied yet.

    This rank's own values are decoded like all others, since all ranks must add the same rounded numbers; its own
    indices are at hand.
    """
    arena = job.arena
    total, most = sum(h.nnz for h in headers), taken.capacity * len(headers)
    # Applied before anything else runs on this thread, so all buckets share these, which also keeps them in cache.
    indices = arena.get("decoded indices", total, torch.uint32, reserve=most)
    values = arena.get("decoded values", total, torch.float32, reserve=most)
    parts, offset = [], 0
    for rank, (header, body) in enumerate(zip(headers, bodies, strict=True)):
        end = offset + header.nnz
        part = (indices[offset:end], values[offset:end])
        if rank == job.channel.rank:
            part = (taken.indices, part[1])
            kernels.decode_values(
                header.value_codec, body[header.index_bytes :], header.nnz, header.value_scale, part[1]
            )
        else:
            decode_body(header, body, *part)
        parts.append(part)
        offset = end
    return parts


def _exchange_dense(job: _Job) -> CollectiveSteps[None]:
    """Sends everything, the residual included; what 16 bits round off on the way goes back to the residual."""
    channel, grad, plan, arena, report = job.channel, job.grad, job.plan, job.arena, job.report
    residual, key = job.bucket.residual, job.bucket.index
    try:
        with job.stage("select"):
            unscale = 1.0 / plan.grad_scale
            taken = take_all(
                job.bucket,
                grad,
                plan.feedback,
                arena,
                scale=unscale,
                held=plan.held,
                clip_norm=plan.clip_norm,
                lasting=job.settle,
            )
            report.nnz, report.nonfinite = grad.numel(), taken.nonfinite
    except Exception as error:
        yield from report_failure(channel, job.header(), error, arena)
        raise  # not reached
    work, summing = grad, False
    try:
        with job.stage("wait"):
            payload = arena.get((key, "payload"), HEADER_BYTES, torch.uint8)
            header = job.header()
            header.value_codec = wire = _dense_codec(plan.value_codec)
            write_header(header, payload)
            headers = yield from agree(channel, header, payload, arena, key)
            if any(h.flags & FLAG_NONFINITE for h in headers):
                job.skip(taken)
                return
            if residual is not None or grad.dtype != torch.float32:
                # The gradient itself stays intact until the sum has arrived, so that a failure can be undone.
                work = arena.get((key, "work"), grad.numel(), torch.float32)
                work.copy_(grad if residual is None else residual)
                if residual is not None and wire != ValueCodec.FP32:
                    taken.left = arena.get((key, "left"), grad.numel(), torch.float32)
            scale = (plan.grad_scale if residual is not None else 1.0) / channel.size
            summing = True
            yield from dense_allreduce(channel, work, arena, key, wire=wire, scale=scale, error=taken.left)
    except BaseException:
        taken.undo()
        if summing and work is grad:
            grad.fill_(math.nan)  # summed in place: half a sum must not pass for a gradient
        raise
    with job.stage("apply"):
        if grad.dtype == torch.float16:
            _keep_if_in_range(job, taken, work)
        else:
            if work is not grad:
                grad.copy_(work)
            job.keep(taken)


def _dense_codec(codec: ValueCodec) -> ValueCodec:
    """Returns how dense values travel: int8 numbers with a scale a block cannot be summed on their way."""
    return ValueCodec.FP16 if codec == ValueCodec.INT8 else codec


def _keep_if_in_range(job: _Job, taken: Taken, average: torch.Tensor) -> None:
    """Writes the average into a float16 bucket, unless it overflows there: the optimizer then skips the step.

    All ranks hold the same average and decide alike.
    """
    low, high = (float(x) for x in torch.aminmax(average)) if average.numel() else (0.0, 0.0)
    if not (low >= -_HALF_MAX and high <= _HALF_MAX):
        job.skip(taken)
        return
    job.grad.copy_(average)
    job.keep(taken)
