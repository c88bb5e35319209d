"""The pipeline of one bucket: accumulate, select, encode, exchange, decode, apply. Read this first.

    1 accumulate   acc = residual + grad                       (fused with step 2 into one pass over memory)
    2 select       take the indices and values of about k elements, the largest; the residual keeps the others
    3 encode       write header, packed indices and packed values; rounding goes to the residual, here or after step 6
    4 exchange     check that all ranks agree, then send the messages of the method
    5 decode       decode and check every payload before anything is applied
    6 apply        write the sum, times 1/P, into the bucket

The steps that differ between methods are in sparsecomm/exchange/methods/.

After a failure at any point this bucket's residual is the same as before the step (to rounding). The bucket holds this
rank's gradient, or NaN if half a sum was in it already. If some rank saw NaN or infinity, or an average does not fit a
float16 bucket, the bucket becomes NaN on every rank, so that all ranks treat the step alike. The one exception is an
exact dense sum without a residual (or with one that is zero): it protects nothing, and NaN travels through it as in
plain DDP.
"""

from __future__ import annotations

import contextlib

import torch

from sparsecomm.collectives import dense_ring_bytes
from sparsecomm.exchange.agree import agree
from sparsecomm.exchange.alignment import largest_sampled, measure_alignment, sampled
from sparsecomm.exchange.method import Exchange, Method, method_named
from sparsecomm.exchange.plan import Plan
from sparsecomm.feedback import BucketMemory, Taken, is_due
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.device import side_of
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps
from sparsecomm.wire import HEADER_BYTES, MAX_ERROR_BYTES, Header, encode_error

__all__ = ["exchange", "report_failure"]

_HALF_MAX = 65504.0


def exchange(
    channel: Channel,
    memory: BucketMemory,
    grad: torch.Tensor,
    plan: Plan,
    arena: Arena,
    workspace: Arena | None = None,
) -> CollectiveSteps[BucketReport]:
    """Averages a gradient bucket over all ranks, sparsely or densely. Collective.

    Args:
        channel: connection to the other ranks.
        memory: memory of the bucket. Mutated.
        grad: shape (n,), float32, float16 or bfloat16, contiguous, not divided by P. Mutated: becomes the average.
        plan: method and options of this exchange.
        arena: allocates message buffers on the host, pinned for a gradient on a GPU.
        workspace: allocates buffers on the gradient's device; None to use `arena` for a gradient on the host.

    Returns:
        A report: bytes, nonzeros and seconds.

    Raises:
        AgreedError: the exchange failed, and every rank raises this error.
        WireError: a payload was damaged on its way to this rank.
        TransportError: the transport failed.
    """
    report = BucketReport(bucket=memory.index, step=plan.step, numel=grad.numel())
    report.dense_bytes = dense_ring_bytes(grad.numel(), channel.size)
    running = Exchange(channel, memory, grad, plan, arena, arena if workspace is None else workspace, report)
    if memory.pending is not None:
        memory.finish_step()
    measured = getattr(plan.feedback, "aligned", False) and channel.size > 1 and grad.numel() and is_due(plan.step)
    compared = _sampled_both(running) if measured else None
    yield from _run(running, method_named(plan.collective)(running))
    if compared is not None and not report.skipped:
        yield from measure_alignment(channel, memory, compared, arena)
        memory.delivered = largest_sampled(grad, memory, plan)
    report.bytes_sent = channel.traffic.bytes_sent
    report.bytes_received = channel.traffic.bytes_received
    return report


def _sampled_both(running: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sampled elements of the gradient and of the residual, both unscaled."""
    memory, plan = running.memory, running.plan
    return sampled(running.grad, memory, plan.step).div_(plan.grad_scale), sampled(memory.residual, memory, plan.step)


def report_failure(channel: Channel, header: Header, cause: BaseException, arena: Arena) -> CollectiveSteps[None]:
    """Takes part in an exchange only to tell the other ranks that this rank failed. Collective.

    Args:
        channel: connection to the other ranks.
        header: identifies the exchange. Mutated.
        cause: the error on this rank.
        arena: allocates the buffers.

    Raises:
        AgreedError: always; its cause is `cause`.
    """
    payload = arena.get((header.bucket, "failure"), HEADER_BYTES + MAX_ERROR_BYTES, torch.uint8)
    encode_error(header, f"{type(cause).__name__}: {cause}", payload)
    with contextlib.suppress(AgreedError):
        yield from agree(channel, header, payload, arena, header.bucket)
    raise AgreedError(cause)


def _run(running: Exchange, method: Method) -> CollectiveSteps[None]:
    """Takes one bucket through all steps."""
    taken: Taken | None = None
    try:
        with running.stage("select"):
            taken = method.take()
            running.report.nnz = taken.nnz
            running.report.nonfinite = taken.nonfinite
        with running.stage("encode"):
            method.encode()
    except Exception as error:
        if taken is not None:
            taken.undo()
        yield from report_failure(running.channel, running.header(), error, running.arena)
        raise  # not reached: report_failure always raises
    try:
        with running.stage("wait"):
            agreement = yield from agree(
                running.channel,
                method.header,
                method.payload,
                running.arena,
                running.memory.index,
                gather=method.has_body,
            )
            finite = not agreement.nonfinite and (yield from method.communicate(agreement))
        if finite:
            with running.stage("apply"):
                method.decode()
    except BaseException:
        taken.undo()
        method.give_up(together=False)
        raise
    with running.stage("apply"):
        if finite and method.finite and _apply(running, method):
            running.keep(taken)
        else:
            running.skip(taken)
            method.give_up(together=True)


def _apply(running: Exchange, method: Method) -> bool:
    """Writes the average into the bucket. Returns False if it overflows a float16 bucket.

    All ranks hold the same average, so all of them return the same.
    """
    grad, scale = running.grad, running.plan.grad_scale / running.channel.size
    if grad.dtype != torch.float16:
        method.write_average(grad, scale)
        method.finish()
        return True
    average = running.workspace.get((running.memory.index, "work"), grad.numel(), torch.float32)
    method.write_average(average, scale)
    low, high = side_of(grad.device).read(torch.stack(torch.aminmax(average))) if average.numel() else (0.0, 0.0)
    if not (low >= -_HALF_MAX and high <= _HALF_MAX):
        return False
    grad.copy_(average)
    method.finish()
    return True
