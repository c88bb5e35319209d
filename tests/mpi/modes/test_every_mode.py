"""Mode by mode: nothing is lost, replicas stay equal to the bit, and sending everything equals plain DDP."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from ledger import Ledger, lossless, sparse
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import flat, grad_of, loss_of, mlp, wrap

import sparsecomm as sc

STEPS = 6
Backward = Callable[[DistributedDataParallel, int], None]


def once(ddp: DistributedDataParallel, step: int) -> None:
    loss_of(ddp, step).backward()


def accumulate(ddp: DistributedDataParallel, step: int) -> None:
    """Three small batches, one communication. A static graph must be seen whole once before."""
    if ddp.static_graph and step == 0:
        once(ddp, step)
        return
    with ddp.no_sync():
        loss_of(ddp, 100 + step).backward()
        loss_of(ddp, 200 + step).backward()
    loss_of(ddp, step).backward()


def two_forwards(ddp: DistributedDataParallel, step: int) -> None:
    """As a discriminator sees real and generated data."""
    (loss_of(ddp, step) + loss_of(ddp, 100 + step)).backward()


def autocast(ddp: DistributedDataParallel, step: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(ddp, step)
    loss.backward()


def branches(choose: Callable[[int, int], str]) -> Backward:
    """A backward in which each rank uses the branches that `choose(step, rank)` names."""

    def backward(ddp: DistributedDataParallel, step: int) -> None:
        ddp.module.use = choose(step, dist.get_rank())
        loss_of(ddp, step).backward()

    return backward


@dataclass(frozen=True)
class Mode:
    """One way of using DDP."""

    make: Callable[[], nn.Module] = mlp
    backward: Backward = once
    ddp: dict[str, Any] = field(default_factory=dict)
    rtol: float = 1e-5


VIEW = {"gradient_as_bucket_view": True}
STATIC = {"static_graph": True}
# torch 2.13 warns that the old name goes.
NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
LOCAL_BUFFERS = {"forward_sync_buffers" if NEW else "broadcast_buffers": False}
UNUSED = {"find_unused_parameters": True}
Branches = partial(zoo.seeded, zoo.Branches)

MODES = {
    "plain": Mode(),
    "views": Mode(ddp=VIEW),
    "one bucket": Mode(ddp={"bucket_cap_mb": 25}),
    "no_sync": Mode(backward=accumulate),
    "no_sync, views": Mode(backward=accumulate, ddp=VIEW),
    "static_graph": Mode(ddp=STATIC),
    "static_graph, no_sync": Mode(backward=accumulate, ddp=STATIC),
    "static_graph, no_sync, views": Mode(backward=accumulate, ddp=STATIC | VIEW),
    "static_graph, never used": Mode(Branches, branches(lambda step, rank: "a"), STATIC),
    "unused, all used": Mode(ddp=UNUSED),
    "unused, some ranks": Mode(Branches, branches(lambda step, rank: "abc"[(step + rank) % 3]), UNUSED),
    "unused, rank 0 only": Mode(Branches, branches(lambda step, rank: "" if rank else "abc"), UNUSED),
    "unused, all ranks": Mode(Branches, branches(lambda step, rank: "abc"[step % 3]), UNUSED),
    "unused, all ranks, views": Mode(Branches, branches(lambda step, rank: "abc"[step % 3]), UNUSED | VIEW),
    "unused, no_sync": Mode(Branches, accumulate, UNUSED),
    "tied": Mode(partial(zoo.seeded, zoo.Tied)),
    "channels-last": Mode(partial(zoo.seeded, zoo.Pictures)),
    "channels-last, views": Mode(partial(zoo.seeded, zoo.Pictures), ddp=VIEW),
    "odd layouts": Mode(partial(zoo.seeded, zoo.Odd)),
    "odd layouts, views": Mode(partial(zoo.seeded, zoo.Odd), ddp=VIEW),
    "empty parameter": Mode(partial(zoo.seeded, zoo.Empty)),
    "frozen": Mode(partial(zoo.seeded, zoo.Frozen)),
    "buffers": Mode(partial(zoo.seeded, zoo.Normalized)),
    "buffers, two forwards": Mode(partial(zoo.seeded, zoo.Normalized), two_forwards, LOCAL_BUFFERS),
    "two forwards": Mode(backward=two_forwards),
    "recomputing": Mode(partial(zoo.seeded, zoo.Recomputing, reentrant=False)),
    "recomputing, repeated": Mode(partial(zoo.seeded, zoo.Recomputing, reentrant=False, repeat=3)),
    "recomputing, reentrant": Mode(partial(zoo.seeded, zoo.Recomputing, reentrant=True)),
    "recomputing, reentrant, repeated": Mode(
        partial(zoo.seeded, zoo.Recomputing, reentrant=True, repeat=3), ddp=STATIC
    ),
    "recomputing, no_sync": Mode(partial(zoo.seeded, zoo.Recomputing, reentrant=False), accumulate),
    "autocast": Mode(backward=autocast, rtol=1e-3),
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def descend(model: nn.Module, lr: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad


@each_mode
@pytest.mark.parametrize("kind", ["sparse", "threshold", "int8"])
def test_nothing_is_lost_and_replicas_agree(world: sc.World, mode: Mode, kind: str) -> None:
    state = {
        "sparse": sparse,
        "threshold": lambda: sc.SparseState(sc.ThresholdTopK(0.1), collective="allgather", value_codec="fp32"),
        "int8": lambda: sparse(value_codec="int8"),
    }[kind]()
    ledger = Ledger(mode.make(), state, **mode.ddp)
    for step in range(STEPS):
        assert ledger.step(partial(mode.backward, ledger.ddp, step))
        ledger.check()
        descend(ledger.model)
    # Batch statistics differ between ranks until the next forward broadcasts those of rank 0, as in plain DDP.
    if not list(ledger.model.buffers()):
        ledger.check_replicas()
    assert ledger.kept_back > 0, "a test in which nothing is kept back proves nothing"
    assert state.metrics().steps == state.step == STEPS


@each_mode
def test_sending_everything_equals_plain_ddp(world: sc.World, mode: Mode) -> None:
    ours, plain = wrap(mode.make(), lossless(), **mode.ddp), wrap(mode.make(), None, **mode.ddp)
    for step in range(STEPS):
        for ddp in (ours, plain):
            ddp.zero_grad(set_to_none=True)
            mode.backward(ddp, step)
        for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
        torch.testing.assert_close(flat(ours, grad_of), flat(plain, grad_of), rtol=mode.rtol, atol=1e-6)
        for ddp in (ours, plain):
            descend(ddp)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=mode.rtol, atol=1e-6)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.filterwarnings("ignore::sparsecomm.ConvergenceWarning")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_keep_replicas_equal(world: sc.World, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    ledger = Ledger(mlp(), sparse(value_codec="fp16"))
    optimizer = make(ledger.ddp.parameters())
    for step in range(STEPS):
        ledger.step(partial(once, ledger.ddp, step))
        optimizer.step()
        ledger.check_replicas()
    ledger.check()


def test_lbfgs_runs_several_backwards_a_step(world: sc.World) -> None:
    """Each evaluation of its closure communicates; all ranks must evaluate equally often, so they see one loss."""
    state = sparse()
    ddp = wrap(mlp(), state)
    optimizer = torch.optim.LBFGS(ddp.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(ddp, 0)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean / world.size

    for _ in range(2):
        optimizer.step(closure)
    steps = torch.tensor([state.step, -state.step], dtype=torch.int64)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    assert int(steps[0]) == -int(steps[1]) > 2, "all ranks took the same number of backward passes"


def test_two_models_that_alternate_lose_nothing(world: sc.World) -> None:
    """As in a GAN: the generator's loss goes through the discriminator, which has a separate step."""
    generator, critic = Ledger(mlp(), sparse()), Ledger(zoo.seeded(nn.Linear, 3, 1, dtype=torch.float32), sparse(0.3))
    for step in range(STEPS):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(100 * step + world.rank), dtype=torch.float32)
        fake = generator.ddp(x).detach()
        critic.step(lambda fake=fake: (critic.ddp(fake) - 1).square().mean().backward())
        descend(critic.model)
        critic.ddp.requires_grad_(False)
        generator.step(lambda x=x: critic.ddp(generator.ddp(x)).square().mean().backward())
        critic.ddp.requires_grad_(True)
        descend(generator.model)
        for ledger in (generator, critic):
            ledger.check()
            ledger.check_replicas()
    assert generator.state.step == critic.state.step == STEPS
