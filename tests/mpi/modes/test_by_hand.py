"""`allreduce_gradients` for scripts without DDP, with all layouts; a failure on one rank reaches all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic

import pytest
import torch
import zoo
from ledger import lossless, sparse
from torch import nn
from training import assert_replicas_equal, flat, grad_of, loss_of, mlp, residual_of, summed, wrap

import sparsecomm as sc

MAKES: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "channels-last": partial(zoo.seeded, zoo.Pictures),
    "odd layouts": partial(zoo.seeded, zoo.Odd),
    "tied": partial(zoo.seeded, zoo.Tied),
    "frozen": partial(zoo.seeded, zoo.Frozen),
    "empty parameter": partial(zoo.seeded, zoo.Empty),
}
each_model = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@each_model
@pytest.mark.parametrize("bucket_bytes", [1, 300, 25 * 2**20])
def test_by_hand_equals_plain_ddp(world: sc.World, make: Callable[[], nn.Module], bucket_bytes: int) -> None:
    model, plain = make(), wrap(make(), None)
    state = lossless(model=model)
    for step in range(4):
        for m in (model, plain):
            m.zero_grad()
            loss_of(m, step).backward()
        sc.allreduce_gradients(model, state, bucket_bytes=bucket_bytes)
        torch.testing.assert_close(flat(model, grad_of), flat(plain, grad_of), rtol=1e-5, atol=1e-6)
    assert state.step == state.metrics().steps == 4


@each_model
def test_by_hand_loses_nothing(world: sc.World, make: Callable[[], nn.Module]) -> None:
    model = make()
    state = sparse(model=model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for step in range(5):
        model.zero_grad()
        loss_of(model, step).backward()
        mine = flat(model, lambda p: p.grad if p.grad is not None else torch.zeros_like(p))
        came_in = summed(mine + before)
        sc.allreduce_gradients(model, state, bucket_bytes=300)
        after = residual_of(state, model)
        got = flat(model, lambda p: p.grad if p.grad is not None else torch.zeros_like(p))
        torch.testing.assert_close(world.size * got + summed(after), came_in, rtol=1e-5, atol=1e-5)
        before = after
        with torch.no_grad():
            for p in trainable:
                p -= 0.1 * p.grad
        assert_replicas_equal(model)


def test_a_rank_without_a_gradient_takes_part_with_zeros_and_gets_the_average(world: sc.World) -> None:
    model = zoo.seeded(zoo.Branches)
    model.use = "a" if world.rank == 0 else ""
    state = lossless(model=model)
    loss_of(model, 0).backward()
    assert (model.a.weight.grad is None) == (world.rank != 0)
    sent = summed(model.a.weight.grad.double() if world.rank == 0 else torch.zeros(3, 12, dtype=torch.float64))
    sc.allreduce_gradients(model, state)
    torch.testing.assert_close(model.a.weight.grad.double(), sent / world.size, rtol=1e-5, atol=1e-7)


def test_gradients_in_another_memory_order_than_their_parameters(world: sc.World) -> None:
    """Autograd may choose another memory order for a gradient."""
    model, plain = nn.Linear(6, 4, bias=False, dtype=torch.float32), nn.Linear(6, 4, bias=False, dtype=torch.float32)
    state = lossless(model=model)
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(world.rank), dtype=torch.float32)
    model.weight.grad = g.t().contiguous().t()
    plain.weight.grad = g.clone()
    sc.allreduce_gradients(model, state)
    torch.testing.assert_close(model.weight.grad.double(), summed(g.double()) / world.size)


def test_under_a_scaler_by_hand(world: sc.World) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model = mlp()
    state = sparse(model=model, scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step == 2 and world.rank == world.size - 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        sc.allreduce_gradients(model, state, bucket_bytes=300)
        before = flat(model).clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(model), before) == (step == 2)
        assert_replicas_equal(model)
    assert scaler.get_scale() == 2.0**7


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(10, 12, sparse=True, dtype=torch.float32)
        self.head = nn.Linear(12, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor, *, look_up: bool) -> torch.Tensor:
        return self.head(x + self.embed(torch.tensor([1], dtype=torch.int64)) if look_up else x)


def test_a_sparse_gradient_on_one_rank_is_told_to_all_at_once(world: sc.World) -> None:
    """Rank 0 looks something up and has a gradient in sparse layout; the others, without one, must not wait for it."""
    model = Lookup()
    state = sparse(model=model)
    model(torch.ones(2, 12, dtype=torch.float32), look_up=world.rank == 0).sum().backward()
    start = monotonic()
    with pytest.raises(sc.SparseCommError, match="sparse"):
        sc.allreduce_gradients(model, state)
    assert monotonic() - start < 0.5 * world.engine.timeout
    other = mlp()
    loss_of(other, 0).backward()
    sc.allreduce_gradients(other, sparse(model=other))


def test_ranks_that_train_other_parameters_are_told_so(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks to disagree")
    model = mlp()
    model[0].requires_grad_(world.rank != 0)
    state = sparse(model=model)
    loss_of(model, 0).backward()
    with pytest.raises(sc.CollectiveMismatch, match=r"rank 0.*rank 1"):
        sc.allreduce_gradients(model, state)


def test_a_model_without_anything_to_train_takes_no_step(world: sc.World) -> None:
    model = mlp().requires_grad_(False)
    state = sparse(model=model)
    sc.allreduce_gradients(model, state)
    assert state.step == 0


def test_a_ddp_model_is_refused(world: sc.World) -> None:
    ddp = wrap(mlp(), None)
    with pytest.raises(sc.ConfigError, match="register sparse_hook"):
        sc.allreduce_gradients(ddp, sparse(model=ddp))


def test_a_strange_tensor_on_one_rank_is_named_on_all(world: sc.World) -> None:
    """The last rank's parameter is on the meta device; the others must not wait for its exchange."""
    model = mlp()
    if world.rank == world.size - 1:
        model[0].weight = nn.Parameter(model[0].weight.detach().to("meta"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = sc.SparseState(sc.TopK(0.1), model=model, collective="allgather")
    with pytest.raises(sc.SparseCommError, match=r"'0\.weight' is on the meta device"):
        sc.allreduce_gradients(model, state)
