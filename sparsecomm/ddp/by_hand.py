"""Averaging of gradients without DDP, for scripts that do not wrap their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sparsecomm.ddp.state import SparseState
from sparsecomm.errors import ConfigError
from sparsecomm.runtime.kinds import check_plain
from sparsecomm.runtime.names import named_plainly

__all__ = ["allreduce_gradients"]

_BUCKET_BYTES = 25 * 2**20  # DDP's default


def allreduce_gradients(model: torch.nn.Module, state: SparseState, *, bucket_bytes: int = _BUCKET_BYTES) -> None:
    """Averages the gradients of a model over all ranks, in place. Collective; call it between backward and step.

    All ranks must hold the same parameters with the same `requires_grad`. A parameter without a gradient on this rank
    contributes zeros and receives the average.

    Args:
        model: a plain module, not DDP. The `.grad` of its parameters is overwritten with the average.
        state: a state made with ``SparseState(..., model=model)``.
        bucket_bytes: approximate size of the flat buckets; the last parameters come first.

    Raises:
        ConfigError: for a DDP model, whose gradients DDP averages, or bucket_bytes < 1.
        SparseCommError: on every rank, if the exchange failed on any.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ConfigError("allreduce_gradients is for models without DDP; register sparse_hook with this one instead")
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
        raise ConfigError(f"bucket_bytes must be a whole number >= 1, got {bucket_bytes!r}")
    buckets = _buckets([p for p in model.parameters() if p.requires_grad], bucket_bytes)
    names = {id(p): name for name, p in named_plainly(model)}
    flats, futures = [], []
    for i, bucket in enumerate(buckets):
        flat, error = _flatten(bucket, names)
        flats.append(flat)
        futures.append(state.start(i, bucket, flat, last=i == len(buckets) - 1, error=error))
    failed: BaseException | None = None
    for future in futures:  # wait for all, since no exchange may be in flight when this returns or raises
        try:
            future.wait()
        except RuntimeError as error:
            failed = failed or state.last_error or error
    if failed is not None:
        raise failed
    for bucket, flat in zip(buckets, flats, strict=True):
        _give_back(bucket, flat)


def _buckets(parameters: Sequence[torch.Tensor], limit: int) -> list[list[torch.Tensor]]:
    """Divides the parameters, last first, into buckets of one dtype and about `limit` bytes."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for p in reversed(parameters):
        nbytes = p.numel() * p.element_size()
        if not buckets or size + nbytes > limit or buckets[-1][0].dtype != p.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += nbytes
    return buckets


def _memory_order(p: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns the elements of `p`, flat, in the memory order of `like` if that is dense."""
    if torch.ops.aten.is_non_overlapping_and_dense(like):
        order = sorted(range(like.dim()), key=like.stride, reverse=True)
        return p.permute(order).reshape(-1)
    return p.reshape(-1)


def _flatten(bucket: Sequence[torch.Tensor], names: Mapping[int, str]) -> tuple[torch.Tensor, Exception | None]:
    """Returns the gradients as one flat tensor, or zeros and the error, which the other ranks must learn of too."""
    try:
        return torch.cat([_flat_grad(p, names[id(p)]) for p in bucket]), None
    except Exception as error:
        like = bucket[0]  # so that this bucket is fused with the same others as on the other ranks
        return torch.zeros(sum(p.numel() for p in bucket), dtype=like.dtype, device=like.device), error


def _flat_grad(p: torch.Tensor, name: str) -> torch.Tensor:
    check_plain(p, f"parameter {name!r}")
    if p.grad is None:
        return torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
    check_plain(p.grad, f"the gradient of {name!r}")
    return _memory_order(p.grad, p)


def _give_back(bucket: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    start = 0
    for p in bucket:
        part = flat[start : start + p.numel()]
        start += p.numel()
        if torch.ops.aten.is_non_overlapping_and_dense(p):
            average = part.as_strided(p.shape, p.stride())
        else:
            average = part.view(p.shape)
        if p.grad is None:
            p.grad = torch.empty_like(p)
        with torch.no_grad():
            p.grad.copy_(average)
