"""Tiny models, deterministic data, and training loops that compare ranks and runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

TINY_BUCKETS = 0.0005
"""bucket_cap_mb: about 500 bytes, so that every model here has several buckets."""


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Five layers of parameters, the same on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(12, 16, dtype=torch.float32),
        nn.Tanh(),
        nn.Linear(16, 10, dtype=torch.float32),
        nn.Tanh(),
        nn.Linear(10, 3, dtype=torch.float32),
    ).to(dtype)


class ConvNet(nn.Module):
    """A channels-last convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float32)
        self.head = nn.Linear(4, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x.to(memory_format=torch.channels_last)).tanh().mean((2, 3)))


def batch(step: int, shape: tuple[int, ...] = (12,), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Any]:
    """This rank's data for a step."""
    g = torch.Generator().manual_seed(10_000 * step + dist.get_rank())
    inputs, targets = (torch.randn(8, *s, generator=g, dtype=torch.float32) for s in (shape, (3,)))
    return inputs.to(dtype), targets.to(dtype)


def wrap(
    model: nn.Module, state: sc.SparseState | None, *, bucket_cap_mb: float = TINY_BUCKETS, **options: Any
) -> DistributedDataParallel:
    """DDP with our hook, or without if there is no state."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, **options)
    if state is not None:
        ddp.register_comm_hook(state, sc.sparse_hook)
    return ddp


def loss_of(model: nn.Module, step: int, **data: Any) -> torch.Tensor:
    """The mean squared error on this rank's data, in float32."""
    inputs, targets = batch(step, **data)
    return (model(inputs) - targets).float().square().mean()


def train(
    model: nn.Module, steps: int, *, first: int = 0, lr: float = 0.1, momentum: float = 0.9, **data: Any
) -> Iterator[int]:
    """Trains by SGD; yields after every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step, **data).backward()
        optimizer.step()
        yield step


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor."""
    out = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(out, tensor.contiguous())
    return out


def flat(model: nn.Module, what: Callable[[nn.Parameter], torch.Tensor | None] = lambda p: p.data) -> torch.Tensor:
    """All parameters (or their gradients) in one float64 vector, in logical order."""
    parts = [what(p) for p in model.parameters()]
    return torch.cat([p.double().reshape(-1) for p in parts if p is not None])


def assert_replicas_equal(model: nn.Module) -> None:
    """Every rank's parameters have the same bits."""
    mine = flat(model).view(torch.int64)
    for rank, other in enumerate(gathered(mine)):
        assert torch.equal(mine, other), f"parameters differ from those of rank {rank}"


def grad_of(p: nn.Parameter) -> torch.Tensor | None:
    """For `flat`."""
    return p.grad


def local_gradient(model: nn.Module, step: int, **data: Any) -> torch.Tensor:
    """What this rank's backward gives without communication."""
    alone = copy.deepcopy(model)
    alone.zero_grad()
    loss_of(alone, step, **data).backward()
    return flat(alone, grad_of)


def residual_of(state: sc.SparseState, model: nn.Module) -> torch.Tensor:
    """This rank's residual in the order of `flat(model)`; zero where there is none."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    saved = state.state_dict()
    parts = []
    for name, p in inner.named_parameters():
        kept = saved.get(f"residual.{name}", torch.empty(0, dtype=torch.float32))
        parts.append(kept if kept.numel() else torch.zeros(p.shape, dtype=torch.float32))
    return torch.cat([p.double().reshape(-1) for p in parts])


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks."""
    return torch.stack(gathered(tensor)).sum(0)
