"""Momentum correction through real training: DGC's formulas, checkpoints with velocity, and the modes of DDP."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from ledger import lossless, sparse
from torch import nn
from training import assert_replicas_equal, flat, grad_of, loss_of, mlp, train, wrap

import sparsecomm as sc
from sparsecomm.presets import preset


def run_pair(ours: nn.Module, plain: nn.Module, optimizers: Any, steps: int = 6) -> None:
    for step in range(steps):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("collective", ["allgather", "dense"])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_sending_everything_without_masking_equals_momentum_sgd(
    world: sc.World, nesterov: bool, collective: str, options: dict[str, bool]
) -> None:
    """torch's SGD: u = m u + g; Nesterov steps by g + m u. DGC's u = m (u + g), step u + g, is the same."""
    feedback = sc.MomentumCorrection(momentum=0.9, nesterov=nesterov, masking=False)
    ours = wrap(mlp(), lossless(feedback=feedback, collective=collective), **options)
    plain = wrap(mlp(), None, **options)
    optimizers = [
        torch.optim.SGD(ours.parameters(), lr=0.05),
        torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=nesterov),
    ]
    run_pair(ours, plain, optimizers)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)
    assert_replicas_equal(ours)


def test_masking_everything_that_is_sent_leaves_plain_sgd(world: sc.World) -> None:
    """All of u is zeroed at every step, so there is no momentum."""
    ours = wrap(mlp(), lossless(feedback=sc.MomentumCorrection(momentum=0.9, masking=True)))
    plain = wrap(mlp(), None)
    run_pair(ours, plain, [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, plain)])
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_dgc_step_by_step(world: sc.World, nesterov: bool, masking: bool) -> None:
    """Compares u, v and the sent values of one bucket with DGC's pseudo code."""
    m = 0.7
    feedback = sc.MomentumCorrection(momentum=m, nesterov=nesterov, masking=masking)
    state = sparse(0.1, feedback=feedback)
    ddp = wrap(mlp(), state, bucket_cap_mb=25)
    names = [n for n, _ in ddp.module.named_parameters()]
    u = torch.zeros_like(flat(ddp))
    v = torch.zeros_like(u)
    for step in range(4):
        alone = copy.deepcopy(ddp.module)
        alone.zero_grad()
        loss_of(alone, step).backward()
        g = flat(alone, grad_of)
        if nesterov:
            u = m * (u + g)
            v = v + u + g
        else:
            u = m * u + g
            v = v + u
        k = round(0.1 * v.numel())
        sent = torch.zeros_like(v, dtype=torch.bool)
        sent[v.abs().topk(k).indices] = True
        v = torch.where(sent, 0.0, v)
        if masking:
            u = torch.where(sent, 0.0, u)
        ddp.zero_grad()
        loss_of(ddp, step).backward()
        saved = state.state_dict()
        for kind, mine in (("velocity", u), ("residual", v)):
            got = torch.cat([saved[f"{kind}.{n}"].double().reshape(-1) for n in names])
            torch.testing.assert_close(got, mine, rtol=1e-4, atol=1e-6, msg=lambda s, k=kind: f"{k}: {s}")


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_each_rank_clips_its_own_gradient(world: sc.World, clip: float) -> None:
    """To clip / sqrt(P), a bucket of n_b of n elements to sqrt(n_b / n) of that: so the average is at most clip."""
    feedback = sc.MomentumCorrection(momentum=0.0, masking=False, clip_norm=clip)
    state = lossless(feedback=feedback)
    ddp, plain = wrap(mlp(), state), wrap(mlp(), None)
    for step in range(3):
        for model in (ddp, plain):
            model.zero_grad()
            loss_of(model, step).backward()
        norm = float(flat(ddp, grad_of).norm())
        if clip == 0.01:
            assert 0 < norm <= clip / world.size**0.5 * 1.0001
        else:
            torch.testing.assert_close(flat(ddp, grad_of), flat(plain, grad_of), rtol=1e-4, atol=1e-6)
    assert_replicas_equal(ddp)


def test_velocity_survives_a_bucket_rebuild_and_a_checkpoint(world: sc.World) -> None:
    """The resumed run repeats the original bit for bit, because the live model keeps its buckets."""
    feedback = sc.MomentumCorrection()
    state = sparse(feedback=feedback)
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 4, momentum=0.0):
        pass
    saved, weights = state.state_dict(), copy.deepcopy(ddp.module.state_dict())
    assert any(bool(t.any()) for k, t in saved.items() if k.startswith("velocity."))
    for _ in train(ddp, 3, first=4, momentum=0.0):
        pass
    once = flat(ddp).clone()
    ddp.module.load_state_dict(weights)
    state.load_state_dict(saved)
    for _ in train(ddp, 3, first=4, momentum=0.0):
        pass
    assert torch.equal(flat(ddp), once)


@pytest.mark.parametrize("make", [mlp, partial(zoo.seeded, zoo.Pictures), partial(zoo.seeded, zoo.Tied)], ids=str)
def test_the_dgc_preset_learns(world: sc.World, make: Any) -> None:
    """Its whole schedule, 25% down to 0.1%: the loss falls on the way and replicas agree."""
    state = sc.SparseState(preset("dgc", steps_per_epoch=8, clip_norm=1.0).change(collective="allgather"))
    ddp = wrap(make(), state)
    start = sum(loss_of(ddp, s).item() for s in range(40))
    for _ in train(ddp, 40, momentum=0.0, lr=0.02):
        pass
    assert sum(loss_of(ddp, s).item() for s in range(40)) < start
    assert_replicas_equal(ddp)
    assert state.last_step().nnz >= len(state.buckets()), "at least one element a bucket is sent"
    assert state.last_step().density < 0.05 or make is not mlp


def test_switching_to_momentum_and_back_mid_run(world: sc.World) -> None:
    state = sparse()
    ddp = wrap(mlp(), state)
    switches = (sc.MomentumCorrection(0.5), sc.ErrorFeedback(), sc.MomentumCorrection(0.9, nesterov=True))
    for phase, feedback in enumerate(switches):
        for _ in train(ddp, 3, first=3 * phase, momentum=0.0):
            assert_replicas_equal(ddp)
        kept = state.residual_norm()
        state.update(feedback=feedback)
        assert state.residual_norm() == kept
        has_velocity = any(k.startswith("velocity.") for k in state.state_dict())
        assert not has_velocity or isinstance(feedback, sc.MomentumCorrection)
    for _ in train(ddp, 2, first=9, momentum=0.0):
        assert_replicas_equal(ddp)


@pytest.mark.parametrize("collective", ["allgather", "dense"])
def test_adam_before_compression_is_each_ranks_own_adam_averaged(world: sc.World, collective: str) -> None:
    beta1, beta2, eps = 0.8, 0.95, 1e-8
    state = lossless(feedback=sc.AdamCorrection(beta1=beta1, beta2=beta2, eps=eps), collective=collective)
    ours, plain = wrap(mlp(), state), mlp()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, weight_decay=0.1) for m in (ours, plain)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in plain.parameters()]
    for step in range(6):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            for p, (m, v) in zip(plain.parameters(), moments, strict=True) if model is plain else ():
                m.lerp_(p.grad, 1 - beta1)
                v.lerp_(p.grad.square(), 1 - beta2)
                p.grad = (m / (1 - beta1 ** (step + 1))) / ((v / (1 - beta2 ** (step + 1))).sqrt() + eps)
                dist.all_reduce(p.grad)
                p.grad /= world.size
            optimizer.step()
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-3, atol=1e-5)
    assert_replicas_equal(ours)
