"""The pipeline of one bucket: accumulate, select, encode, exchange, decode, apply. Read this first.

    1 accumulate   acc = residual + grad                       (one fused pass over memory with 2)
    2 select       indices and values of about the k largest; the residual keeps the others
    3 encode       header + packed indices + packed values; what packing the values rounds off goes to the residual
    4 exchange     first all ranks find out together whether they agree; then the collective
    5 decode       everything that came is checked whole before anything is applied
    6 apply        the sum, times 1/P, into the bucket

What differs from one collective to another is in its `Strategy`, in sparsecomm/strategies/.

A failure at any point leaves the residual as it was before the step (to rounding), and the bucket untouched or, if
some rank saw NaN or infinity, NaN on every rank.
"""

from __future__ import annotations

import contextlib

import torch

from sparsecomm.collectives import dense_ring_bytes
from sparsecomm.exchange.agree import agree
from sparsecomm.exchange.method import Job, Strategy, blank_header, strategy_of
from sparsecomm.exchange.plan import Plan
from sparsecomm.feedback import BucketMemory, Taken
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.device import side_of
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps
from sparsecomm.wire import HEADER_BYTES, MAX_ERROR_BYTES, Header, encode_error

__all__ = ["BucketMemory", "Plan", "blank_header", "exchange", "report_failure"]

_HALF_MAX = 65504.0


def exchange(
    channel: Channel,
    bucket: BucketMemory,
    grad: torch.Tensor,
    plan: Plan,
    arena: Arena,
    *,
    settle: bool = True,
    memory: Arena | None = None,
) -> CollectiveSteps[BucketReport]:
    """Averages a gradient bucket over all ranks, sparsely or densely. Collective.

    Args:
        channel: the ranks.
        bucket: Mutated: the residual and the compressor's memory.
        grad: shape (n,), float32, float16 or bfloat16, contiguous, not divided by P. Mutated: becomes the average.
        plan: what to do.
        arena: gives all work buffers.
        memory: gives those on the gradient's device, for one on a GPU; `arena` then gives pinned ones on the host.
        settle: whether the step is final once this bucket is exchanged; else the caller calls `BucketMemory.settle`
            when it knows whether the optimizer takes the whole step.

    Returns:
        What it cost.

    Raises:
        AgreedError: on every rank alike, after a failure that all know of.
        WireError: a payload was damaged on its way to this rank.
        TransportError: the transport failed.
    """
    report = BucketReport(bucket=bucket.index, step=plan.step, numel=grad.numel())
    report.dense_bytes = dense_ring_bytes(grad.numel(), channel.size)
    job = Job(channel, bucket, grad, plan, arena, report, settle, exchange, arena if memory is None else memory)
    bucket.settle()
    yield from _run(job, strategy_of(plan.collective)(job))
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


def _run(job: Job, how: Strategy) -> CollectiveSteps[None]:
    """Takes one bucket through all steps."""
    taken: Taken | None = None
    try:
        with job.stage("select"):
            taken = how.take()
            job.report.nnz = job.grad.numel() if taken.whole else taken.values.numel()
            job.report.nonfinite = taken.nonfinite
        with job.stage("encode"):
            how.encode(taken)
    except Exception as error:
        if taken is not None:
            taken.undo()
        yield from report_failure(job.channel, job.header(), error, job.arena)
        raise  # not reached: the line above raises what all ranks now know
    try:
        with job.stage("wait"):
            agreement = yield from agree(
                job.channel, how.header, how.payload, job.arena, job.bucket.index, gather=how.gathers_headers
            )
            finite = not agreement.nonfinite and (yield from how.communicate(agreement))
        if finite:
            with job.stage("apply"):
                how.decode()
    except BaseException:
        taken.undo()
        how.interrupted()
        raise
    with job.stage("apply"):
        if finite and _apply(job, how):
            job.keep(taken)
        else:
            job.skip(taken)
            how.skipped()


def _apply(job: Job, how: Strategy) -> bool:
    """Step 6. Returns False if the average overflows a float16 bucket: the optimizer then skips the step.

    All ranks hold the same average and decide alike.
    """
    grad, scale = job.grad, job.plan.grad_scale / job.channel.size
    if grad.dtype != torch.float16:
        how.write_average(grad, scale)
        how.settle()
        return True
    average = job.memory.get((job.bucket.index, "work"), grad.numel(), torch.float32)
    how.write_average(average, scale)
    low, high = side_of(grad.device).read(torch.stack(torch.aminmax(average))) if average.numel() else (0.0, 0.0)
    if not (low >= -_HALF_MAX and high <= _HALF_MAX):
        return False
    grad.copy_(average)
    how.settle()
    return True
