"""The optimizers of sparsecomm.optim under DDP: replicas stay equal in every mode that touches parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from ledger import lossless, sparse
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from training import assert_replicas_equal, flat, loss_of, mlp, wrap

import sparsecomm as sc

OPTIMIZERS = {
    "adamw": lambda ddp, state: sc.optim.AdamW(ddp.parameters(), state, lr=0.01, weight_decay=0.1, max_norm=1.0),
    "sgd": lambda ddp, state: sc.optim.SGD(ddp.parameters(), state, lr=0.05, momentum=0.9, weight_decay=0.01),
}


def steps(ddp: DDP, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("collective", ["allgather", "split_reduce", "two_level", "dense"])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_replicas_stay_equal_and_come_back(
    world: sc.World, kind: str, collective: str, options: dict[str, bool]
) -> None:
    state = sparse(0.1, collective=collective)
    ddp = wrap(mlp(), state, **options)
    optimizer = OPTIMIZERS[kind](ddp, state)
    steps(ddp, optimizer, 6)
    assert_replicas_equal(ddp)
    before = flat(ddp)
    loss = loss_of(ddp, 6)
    if collective in ("allgather", "split_reduce"):
        assert not torch.equal(flat(ddp), before), "ahead for the backward pass"
    loss.backward()
    assert torch.equal(flat(ddp), before)
    loss_of(ddp, 7)
    saved = copy.deepcopy(ddp.state_dict())
    assert torch.equal(flat(ddp), before), "saving brings the parameters back"
    assert all(torch.equal(saved[f"module.{name}"], p) for name, p in ddp.module.named_parameters())


def test_sgd_that_sends_everything_is_torchs(world: sc.World) -> None:
    """Momentum is linear, so that the ranks' own momentum adds up to that of the average."""
    state = lossless()
    ours, plain = wrap(mlp(), state), wrap(mlp(), None)
    a = sc.optim.SGD(ours.parameters(), state, lr=0.05, momentum=0.9)
    b = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    steps(ours, a, 6)
    steps(plain, b, 6)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


def test_ranks_that_agree_train_like_one(world: sc.World) -> None:
    """The same data everywhere: the alignment is 1, so that nothing is scaled, and the norm is clipped to max_norm.

    The decay of the second moment is the P-th root, which makes P ranks average over as many gradients as one.
    """
    state = lossless()
    ours, plain = wrap(mlp(), state, bucket_cap_mb=25), wrap(mlp(), None)
    a = sc.optim.AdamW(ours.parameters(), state, lr=0.01, betas=(0.9, 0.95), max_norm=0.05)
    b = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95 ** (1 / world.size)))
    for step in range(6):
        x = torch.randn(8, mlp()[0].in_features, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
        for ddp, optimizer in ((ours, a), (plain, b)):
            optimizer.zero_grad()
            ddp(x).square().mean().backward()
        before_clipping = float(nn.utils.clip_grad_norm_(plain.parameters(), 0.05))
        assert before_clipping > 0.05, "something to clip"
        a.step(), b.step()
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


class Uneven(nn.Module):
    """800 elements with small gradients and 200 with large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = (nn.Parameter(torch.ones(n, dtype=torch.float32)) for n in (800, 200))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.001 * (self.many * x[:800]).sum() + 10.0 * (self.few * x[800:]).sum()


def test_a_bucket_is_clipped_to_its_share_of_the_norm(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("a single rank measures nothing")
    state = lossless()
    ddp = wrap(Uneven(), state)
    optimizer = sc.optim.SGD(ddp.parameters(), state, lr=0.0, max_norm=1.0)
    for _ in range(24):  # DDP's first step has one bucket, whose measurement has to fade
        optimizer.zero_grad()
        ddp(torch.ones(1000, dtype=torch.float32)).backward()
    assert len(state.buckets()) == 2
    norm = float(ddp.module.few.grad.norm())
    assert norm == pytest.approx(((0.2 + 1.0) / 2) ** 0.5, rel=0.02), "a fifth of the elements, all of the norm"


def test_accumulation_takes_all_gradients_at_one_place(world: sc.World) -> None:
    state = sparse(0.1)
    ddp = wrap(mlp(), state)
    optimizer = OPTIMIZERS["adamw"](ddp, state)
    for step in range(4):
        optimizer.zero_grad()
        with ddp.no_sync():
            loss_of(ddp, 2 * step).backward()
        ahead = flat(ddp)
        loss = loss_of(ddp, 2 * step + 1)
        assert torch.equal(flat(ddp), ahead)
        loss.backward()
        optimizer.step()
        assert_replicas_equal(ddp)


def test_a_skipped_step_under_a_grad_scaler_changes_nothing(world: sc.World) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = sparse(0.2, scaler=scaler)
    ddp = wrap(mlp(), state)
    optimizer = OPTIMIZERS["adamw"](ddp, state)

    def one(step: int, *, overflow: bool = False) -> None:
        optimizer.zero_grad()
        scaled = scaler.scale(loss_of(ddp, step))
        (scaled * torch.inf if overflow and world.rank == world.size - 1 else scaled).backward()
        scaler.step(optimizer)
        scaler.update()

    for step in range(3):
        one(step)
    before = copy.deepcopy(ddp.state_dict())
    waiting = {k: t.clone() for k, t in state.state_dict().items() if k.startswith("residual.")}
    one(3, overflow=True)
    assert_replicas_equal(ddp)
    assert all(torch.equal(p, before[f"module.{name}"]) for name, p in ddp.module.named_parameters())
    assert all(torch.equal(t, before[k]) for k, t in ddp.state_dict().items())
    for k, t in state.state_dict().items():
        if k in waiting:
            torch.testing.assert_close(t, waiting[k], rtol=1e-4, atol=1e-5)
    one(4)
    assert_replicas_equal(ddp)


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(world: sc.World) -> None:
    state = sparse(0.1)
    ddp = wrap(mlp(), state)
    optimizer = OPTIMIZERS["adamw"](ddp, state)
    steps(ddp, optimizer, 5)
    saved: Any = copy.deepcopy((ddp.module.state_dict(), optimizer.state_dict(), state.state_dict()))
    steps(ddp, optimizer, 4, first=5)
    whole = flat(ddp)
    for part, content in zip((ddp.module, optimizer, state), saved, strict=True):
        part.load_state_dict(content)
    steps(ddp, optimizer, 4, first=5)
    assert torch.equal(flat(ddp), whole)
    assert any(k.startswith("alignment.") for k in saved[2])


def test_clipping_the_updates_is_named_on_every_rank(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("one rank measures nothing")
    state = sparse(0.5)
    ddp = wrap(mlp(), state)
    optimizer = OPTIMIZERS["adamw"](ddp, state)
    loss_of(ddp, 0).backward()
    nn.utils.clip_grad_norm_(ddp.parameters(), 1e-3)
    with pytest.raises(sc.ConfigError, match="max_norm="):
        optimizer.step()


@pytest.mark.filterwarnings("ignore")  # what torch.compile says of itself
def test_it_trains_a_compiled_model(world: sc.World) -> None:
    torch._dynamo.reset()
    state = sparse(0.1)
    ddp = wrap(mlp(), state, bucket_cap_mb=25)
    optimizer = OPTIMIZERS["adamw"](ddp, state)
    compiled = torch.compile(ddp, backend="eager")
    for step in range(4):
        optimizer.zero_grad()
        before = flat(ddp)
        loss = loss_of(compiled, step)
        assert torch.equal(flat(ddp), before) == (step == 0), "ahead as soon as something waits"
        loss.backward()
        optimizer.step()
    assert_replicas_equal(ddp)


@pytest.mark.parametrize("model", [zoo.Tied, zoo.Frozen], ids=lambda m: m.__name__)
def test_tied_and_frozen_parameters(world: sc.World, model: Any) -> None:
    state = sparse(0.1)
    ddp = wrap(zoo.seeded(model), state)
    optimizer = OPTIMIZERS["adamw"](ddp, state)
    steps(ddp, optimizer, 4)
    assert_replicas_equal(ddp)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_uneven_inputs_leave_replicas_equal(world: sc.World, kind: str) -> None:
    """A rank without data steps less often; decay and alignment must not depend on that."""
    state = sparse(0.1)
    ddp = wrap(mlp(), state)
    optimizer = OPTIMIZERS[kind](ddp, state)
    for first in (0, 10):
        with ddp.join():
            steps(ddp, optimizer, 3 + (world.rank == 0), first=first)
        steps(ddp, optimizer, 2, first=first + 5)
        assert_replicas_equal(ddp)
