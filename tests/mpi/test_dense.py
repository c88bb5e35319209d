"""The dense allreduce over real messages, and dense training in 16 bits."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch
import torch.distributed as dist
from training import loss_of, mlp, wrap

import sparsecomm as sc
from sparsecomm.collectives import DenseSum, dense_allreduce, doubling_allreduce, halving_allreduce, ring_allreduce
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Task
from sparsecomm.types import ValueCodec


def alike(tensor: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    octets = tensor.detach().contiguous().view(torch.uint8)
    everyone = [torch.empty_like(octets) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, octets)
    return all(torch.equal(octets, other) for other in everyone)


@pytest.mark.parametrize("algorithm", [ring_allreduce, halving_allreduce, doubling_allreduce, dense_allreduce])
@pytest.mark.parametrize("wire", [ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16])
def test_sums_agree_and_nothing_is_lost(world: sc.World, algorithm: Any, wire: ValueCodec) -> None:
    for numel in (0, 1, 1001, 300_007):
        check_sum(world, algorithm, wire, numel)


def check_sum(world: sc.World, algorithm: Any, wire: ValueCodec, numel: int) -> None:
    mine = torch.randn(numel, generator=torch.Generator().manual_seed(world.rank), dtype=torch.float32)
    exact = mine.double()
    dist.all_reduce(exact)
    work, error = mine.clone(), torch.zeros(numel, dtype=torch.float32)
    options: dict[str, Any] = {"segment": 20_000} if algorithm is ring_allreduce else {}
    dense = DenseSum(work, wire, error=error if wire != ValueCodec.FP32 else None)
    arena = Arena()
    world.engine.call("dense", lambda channel: algorithm(channel, dense, arena, "k", **options))
    assert alike(work)
    kept = error.double()
    dist.all_reduce(kept)
    torch.testing.assert_close(work.double() + kept, exact, rtol=1e-5, atol=1e-5)


def test_many_dense_sums_in_flight_do_not_mix(world: sc.World) -> None:
    works = [torch.full((7 + 1000 * i,), float(world.rank + i), dtype=torch.float32) for i in range(20)]
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for i, work in enumerate(works):
        arena = Arena()
        world.engine.submit(
            Task(f"sum {i}", lambda c, w=work, a=arena: dense_allreduce(c, DenseSum(w), a, 0), done.put, done.put)
        )
    assert [done.get(timeout=60) for _ in works] == [None] * len(works)
    for i, work in enumerate(works):
        assert bool((work == sum(r + i for r in range(world.size))).all())


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_dense_training_in_16_bits_keeps_replicas_alike_and_close_to_plain_ddp(world: sc.World, codec: str) -> None:
    state = sc.SparseState(sc.Dense(), value_codec=codec)
    ours, plain = wrap(mlp(), state), wrap(mlp(), None)
    for model in (ours, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert alike(mine)
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.005)
    metrics = state.metrics()
    assert metrics.steps == 10
    if world.size > 1:
        values = sum(p.numel() for p in ours.parameters())
        assert metrics.bytes_sent < 10 * (8 * values + 4096 * world.size)
