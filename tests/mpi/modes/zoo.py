"""Small models, each with one thing that has broken a hook somewhere; all take (n, 12) and give (n, 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import mlp


def seeded(make: Any, *args: Any, **options: Any) -> nn.Module:
    """The same model on every rank."""
    torch.manual_seed(7)
    return make(*args, **options)


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12, bias=False, dtype=torch.float32)
        self.second = nn.Linear(12, 12, bias=False, dtype=torch.float32)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Branches(nn.Module):
    """Three optional layers; `use` says which of them take part."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(12, 3, dtype=torch.float32)
        self.a, self.b, self.c = (nn.Linear(12, 3, dtype=torch.float32) for _ in range(3))
        self.use = "abc"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x) + sum(getattr(self, name)(x) for name in self.use)


class Pictures(nn.Module):
    """Convolutions in channels-last memory, one of them depthwise (one channel: its strides are ambiguous)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, dtype=torch.float32)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, dtype=torch.float32)
        self.cube = nn.Conv3d(2, 2, 2, dtype=torch.float32)
        self.head = nn.Linear(8, 3, dtype=torch.float32)
        self.conv.to(memory_format=torch.channels_last)
        self.depthwise.to(memory_format=torch.channels_last)
        self.cube.to(memory_format=torch.channels_last_3d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picture = x.reshape(-1, 3, 2, 2).to(memory_format=torch.channels_last)
        volume = x[:, :8].reshape(-1, 2, 2, 2, 1).expand(-1, 2, 2, 2, 2)
        flat = [self.depthwise(self.conv(picture).tanh()).mean((2, 3)), self.cube(volume).flatten(1)]
        return self.head(torch.cat(flat, 1).tanh())


class Odd(nn.Module):
    """Parameters of no dimension, transposed, with gaps between elements, and of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(3, 12, dtype=torch.float32).t())
        self.gaps = nn.Parameter(torch.randn(3, 6, dtype=torch.float32)[:, ::2])
        self.scalar = nn.Parameter(torch.tensor(0.5, dtype=torch.float32))
        self.one = nn.Parameter(torch.ones(1, 1, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.transposed).tanh() @ self.gaps) * self.scalar + self.one


class Normalized(nn.Module):
    """Batch statistics and another buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(12, 16, dtype=torch.float32),
            nn.BatchNorm1d(16, dtype=torch.float32),
            nn.Tanh(),
            nn.Linear(16, 3, dtype=torch.float32),
        )
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.body(x)


class Recomputing(nn.Module):
    """A block whose forward runs again in backward; `repeat` uses it more than once."""

    def __init__(self, *, reentrant: bool, repeat: int = 1) -> None:
        super().__init__()
        self.reentrant, self.repeat = reentrant, repeat
        self.block = nn.Sequential(nn.Linear(12, 12, dtype=torch.float32), nn.Tanh())
        self.head = nn.Linear(12, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for _ in range(self.repeat):
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Frozen(nn.Module):
    """Fine-tuning: most of the model does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.inner[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Empty(nn.Module):
    """A parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.float32))
        self.inner = nn.Linear(12, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.nothing.sum()
