"""A ledger of gradients that enter the hook and averages that DDP returns: no mode may lose anything.

No `from __future__ import annotations` here: DDP refuses hooks with string annotations.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import TINY_BUCKETS

import sparsecomm as sc
from sparsecomm.runtime.names import named_plainly

Named = dict[str, torch.Tensor]


def sparse(density: float = 0.1, **options: Any) -> sc.SparseState:
    """A state that keeps most of a gradient back, and rounds nothing."""
    return sc.SparseState(sc.TopK(density), **{"collective": "allgather", "value_codec": "fp32", **options})


def lossless(**options: Any) -> sc.SparseState:
    """A state that sends everything, exactly: the run must equal plain DDP to rounding."""
    return sparse(1.0, **options)


def in_shape(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's slice of a bucket in the parameter's shape: DDP keeps dense memory orders (channels-last)."""
    if torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat.view(parameter.shape)


def _flat(named: Named) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in named.values()])


class Ledger:
    """A DDP model with a hook that records, by parameter name, this rank's gradients and averages.

    `step` runs one optimizer step's backward; `check` gathers all ranks' books and compares.
    """

    def __init__(self, model: nn.Module, state: sc.SparseState, *, bucket_cap_mb: float = TINY_BUCKETS, **ddp: Any):
        self.state, self.model, self.group = state, model, ddp.get("process_group")
        self.size = dist.get_world_size(self.group)
        self.scale: Callable[[], float] = lambda: 1.0
        self.names = {id(p): n for n, p in named_plainly(model)}
        self.given: Named = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in named_plainly(model)}
        self.got: Named = {n: t.clone() for n, t in self.given.items()}
        self._seen: list[tuple[list[torch.Tensor], torch.Tensor]] = []

        def hook(state: sc.SparseState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self._seen.append((list(bucket.parameters()), bucket.buffer().clone()))
            return sc.sparse_hook(state, bucket)

        self.ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, **ddp)
        self.ddp.register_comm_hook(state, hook)

    def descend(self) -> None:
        """Moves the model against its gradients, as an optimizer does."""
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p.sub_(0.05 * p.grad)

    def step(self, backward: Callable[[], None]) -> bool:
        """Runs a backward pass; books it, unless the optimizer will skip it for NaN.

        Returns:
            Whether all gradients are finite.
        """
        self.ddp.zero_grad(set_to_none=True)
        self._seen.clear()
        scale = self.scale()
        backward()
        finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.model.parameters())
        for parameters, buffer in self._seen:
            start = 0
            for p in parameters:
                flat = buffer[start : start + p.numel()]
                start += p.numel()
                self._book(self.given, p, in_shape(flat, p), scale, finite)
        for p in self.model.parameters():
            if p.grad is not None:
                self._book(self.got, p, p.grad, scale, finite)
        return finite

    def _book(self, into: Named, p: torch.Tensor, value: torch.Tensor, scale: float, counts: bool) -> None:
        if counts:
            into[self.names[id(p)]] += value.detach().double() / scale

    def residuals(self) -> Named:
        """This rank's residuals by name, zeros where there are none."""
        saved = self.state.state_dict()
        out = {}
        for name, zeros in self.given.items():
            kept = saved.get(f"residual.{name}", torch.empty(0, dtype=torch.float32))
            out[name] = kept.double() if kept.numel() == zeros.numel() else torch.zeros_like(zeros)
        return out

    def check(self, *, rank: int | None = None, rtol: float = 1e-5, atol: float = 1e-5) -> None:
        """Sum over ranks of gradients = P * (sum of applied averages) + sum over ranks of residuals, by parameter.

        Collective. What was applied is the same on every rank, to the bit.

        Args:
            rank: take its word for what was applied (with Join, that of the rank that stayed longest).
        """
        books = torch.stack([_flat(t) for t in (self.given, self.got, self.residuals())])
        everyone = [torch.empty_like(books) for _ in range(self.size)]
        dist.all_gather(everyone, books, group=self.group)
        given, _, kept = torch.stack(everyone).sum(0)
        got = [b[1] for b in everyone]
        if rank is None:
            unlike = self._where(torch.stack([g != got[0] for g in got]).any(0))
            assert not unlike, f"ranks were given different averages of {unlike}"
        out = self.size * got[rank or 0] + kept
        lost = self._where(~torch.isclose(out, given, rtol=rtol, atol=atol))
        assert not lost, f"gradients of {lost} were lost or made up, by up to {float((out - given).abs().max())}"

    def check_replicas(self) -> None:
        """Parameters and buffers have the same bits on every rank of the group. Collective."""
        mine = torch.cat([t.detach().double().reshape(-1) for t in [*self.model.parameters(), *self.model.buffers()]])
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        assert all(torch.equal(o, everyone[0]) for o in everyone), "replicas differ"

    def _where(self, flags: torch.Tensor) -> list[str]:
        """Names of the parameters in which any flag is set."""
        parts = flags.split([t.numel() for t in self.given.values()])
        return [name for name, part in zip(self.given, parts, strict=True) if part.any()]

    @property
    def kept_back(self) -> float:
        """Sum of magnitudes in this rank's residuals: a test in which nothing is kept back proves nothing."""
        return float(sum(t.abs().sum() for t in self.residuals().values()))


def assert_skips_lose_nothing(
    make: Callable[[nn.Module, torch.amp.GradScaler], Ledger], *, steps: int, bad: tuple[int, int], every_step: bool
) -> None:
    """Trains with a GradScaler; in two steps the last rank's gradient is infinite, and exactly these are skipped.

    Args:
        make: makes the ledger of a model whose state knows the scaler.
        steps: of training.
        bad: the steps in which the last rank overflows.
        every_step: whether the books are looked at after each step, or only at the end.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8, dtype=torch.float32), nn.Tanh(), nn.Linear(8, 2, dtype=torch.float32))
    ledger = make(model, scaler)
    ledger.scale = lambda: float(scaler.get_scale())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rank, skipped = dist.get_rank(), 0
    for step in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float32)
        if step in bad and rank == dist.get_world_size() - 1:
            x[0, 0] = float("inf")
        skipped += not ledger.step(lambda x=x: scaler.scale(ledger.ddp(x).square().mean()).backward())
        scaler.step(optimizer)
        scaler.update()
        if every_step or step == steps - 1:
            ledger.check()
            ledger.check_replicas()
    assert skipped == 2
