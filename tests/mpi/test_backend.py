"""The backend's collectives and messages against plain arithmetic, over real messages, in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.transport import mpi

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please use:FutureWarning")  # names of older torch

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]
EVERY = [*FLOATS, *WHOLE, *FP8, *UNSIGNED, *COMPLEX, torch.bool]
LENGTHS = [0, 1, 3, 1000, 70_001]


@pytest.fixture(scope="module")
def ours(world: sc.World) -> Iterator[Any]:
    """A group of all ranks."""
    group = dist.new_group(backend="sparsecomm")
    yield group
    dist.destroy_process_group(group)


def values(rank: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Small numbers that every rank can compute for any other, and whose sums and products every dtype holds."""
    g = torch.Generator().manual_seed(100 + rank)
    found = torch.randint(0, 3, (n,), generator=g, dtype=torch.int64)
    return found.to(torch.float32).to(dtype) if dtype in FP8 else found.to(dtype)


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(octets(a), octets(b))


def reduced(world: sc.World, n: int, dtype: torch.dtype, op: str) -> torch.Tensor:
    """The result of an operation, in the widest dtype."""
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    parts = torch.stack(
        [values(r, n, dtype).to(torch.float32 if dtype in FP8 else dtype).to(wide) for r in range(world.size)]
    )
    if op == "SUM":
        return parts.sum(0)
    if op == "AVG":
        mean = parts.sum(0) / world.size
        return mean if dtype.is_floating_point or dtype.is_complex else mean.trunc()
    if op == "PRODUCT":
        return parts.prod(0)
    if op == "MIN":
        return parts.min(0).values
    if op == "MAX":
        return parts.max(0).values
    total = parts[0]
    for part in parts[1:]:
        total = {"BAND": total & part, "BOR": total | part, "BXOR": total ^ part}[op]
    return total


CASES = [(dtype, op) for dtype in [*FLOATS, *WHOLE] for op in ("SUM", "AVG", "PRODUCT", "MIN", "MAX")]
CASES += [(dtype, op) for dtype in WHOLE for op in ("BAND", "BOR", "BXOR")]
CASES += [(dtype, "SUM") for dtype in [*FP8, *UNSIGNED, *COMPLEX]]


@pytest.mark.parametrize(("dtype", "op"), CASES, ids=str)
def test_reductions(world: sc.World, ours: Any, dtype: torch.dtype, op: str) -> None:
    kind = getattr(dist.ReduceOp, op)
    for n in LENGTHS:
        expected = reduced(world, n, dtype, op)
        expected = (expected.float() if dtype in FP8 else expected).to(dtype)
        tensor = values(world.rank, n, dtype)
        ours.allreduce([tensor], kind).wait()
        close(tensor, expected)
        for root in {0, world.size - 1}:
            tensor = values(world.rank, n, dtype)
            options = dist.ReduceOptions()
            options.rootRank, options.reduceOp = root, kind
            ours.reduce([tensor], options).wait()
            close(tensor, expected) if world.rank == root else close(tensor, values(world.rank, n, dtype))
        out = torch.empty_like(tensor)
        shifted = [values(world.rank, n, dtype) for _ in range(world.size)]
        ours.reduce_scatter([out], [shifted], kind).wait()
        close(out, expected)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to a rounding of the dtype."""
    if a.dtype in FP8 or a.dtype in UNSIGNED:
        assert same(a, b)
        return
    torch.testing.assert_close(a, b)


def test_bool_keeps_valid_bytes(world: sc.World, ours: Any) -> None:
    mine = torch.tensor([True, False, world.rank == 0], dtype=torch.bool)
    for op, expected in {
        "SUM": [1, 0, 1],
        "MAX": [1, 0, 1],
        "BOR": [1, 0, 1],
        "BXOR": [world.size % 2, 0, 1],
        "PRODUCT": [1, 0, int(world.size == 1)],
        "MIN": [1, 0, int(world.size == 1)],
    }.items():
        tensor = mine.clone()
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group=ours)
        assert octets(tensor).tolist() == expected, op


def test_sums_of_16_bits_are_rounded_once(world: sc.World, ours: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for n in (100, 50_000):
            parts = [
                torch.randn(n, generator=torch.Generator().manual_seed(r), dtype=torch.float32).to(dtype)
                for r in range(world.size)
            ]
            tensor = parts[world.rank].clone()
            dist.all_reduce(tensor, group=ours)
            total = parts[0].float()
            for part in parts[1:]:
                total += part.float()
            assert same(tensor, total.to(dtype))


def test_a_factor_before_the_sum(world: sc.World, ours: Any) -> None:
    make = torch._C._distributed_c10d._make_nccl_premul_sum
    for factor in (0.5, torch.tensor([2.0], dtype=torch.float32)):
        tensor = torch.full((5,), float(world.rank + 1), dtype=torch.float32)
        options = dist.AllreduceOptions()
        options.reduceOp = make(factor)
        ours.allreduce([tensor], options).wait()
        assert bool((tensor == float(factor) * world.size * (world.size + 1) / 2).all())


@pytest.mark.parametrize(("dtype", "op"), [(torch.float32, "BAND"), (torch.complex64, "MAX"), (torch.bool, "AVG")])
def test_operations_that_a_dtype_does_not_have_are_refused(ours: Any, dtype: torch.dtype, op: str) -> None:
    with pytest.raises(ConfigError, match=f"{op} does not exist for {dtype}"):
        ours.allreduce([torch.zeros(3, dtype=dtype)], getattr(dist.ReduceOp, op))


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_moving_every_dtype_by_its_bytes(world: sc.World, ours: Any, dtype: torch.dtype) -> None:
    for n in LENGTHS:
        everyone = [values(r, n, dtype) for r in range(world.size)]
        mine = everyone[world.rank]
        for root in {0, world.size - 1}:
            tensor = mine.clone()
            ours.broadcast(tensor, root).wait()
            assert same(tensor, everyone[root])
            gathered = [torch.empty_like(mine) for _ in everyone] if world.rank == root else []
            ours.gather([gathered] if gathered else [], [mine], root).wait()
            assert all(map(same, gathered, everyone))
            part = torch.empty_like(mine)
            ours.scatter([part], [everyone] if world.rank == root else [], root).wait()
            assert same(part, mine)
        found = [torch.empty_like(mine) for _ in everyone]
        ours.allgather([found], [mine]).wait()
        assert all(map(same, found, everyone))
        whole = mine.new_empty(n * world.size)
        ours.all_gather_single(whole, mine).wait()
        assert all(same(whole[r * n : (r + 1) * n], e) for r, e in enumerate(everyone))
        swapped = [torch.empty_like(mine) for _ in everyone]
        ours.alltoall(swapped, [mine.clone() for _ in everyone]).wait()
        assert all(map(same, swapped, everyone))


def test_the_own_part_of_the_output_may_be_the_input(world: sc.World, ours: Any) -> None:
    whole = torch.full((world.size * 4,), -1.0, dtype=torch.float32)
    mine = whole[world.rank * 4 : world.rank * 4 + 4]
    mine.fill_(float(world.rank))
    dist.all_gather_into_tensor(whole, mine, group=ours)
    assert whole.tolist() == [float(r) for r in range(world.size) for _ in range(4)]
    inputs = torch.arange(world.size * 3, dtype=torch.float64)
    out = inputs[world.rank * 3 : world.rank * 3 + 3]
    expected = out.clone() * world.size
    dist.reduce_scatter_tensor(out, inputs, group=ours)
    assert same(out, expected)


def strided(world: sc.World, rank: int) -> list[torch.Tensor]:
    """The same 24 numbers at four strides and an offset."""
    base = (torch.arange(24, dtype=torch.float64) * (rank + 1)).view(4, 6)
    gaps = torch.full((9, 12), -7.0, dtype=torch.float64)[1::2, ::2]
    gaps.copy_(base)
    turned = torch.empty(6, 4, dtype=torch.float64).t()
    turned.copy_(base)
    late = torch.full((29,), -7.0, dtype=torch.float64)[5:].view(4, 6)
    late.copy_(base)
    return [base, gaps, turned, late]


def test_strides_make_no_difference(world: sc.World, ours: Any) -> None:
    for i, _ in enumerate(strided(world, 0)):
        everyone = [strided(world, r)[i] for r in range(world.size)]
        tensor = strided(world, world.rank)[i]
        dist.all_reduce(tensor, group=ours)
        assert torch.equal(tensor, torch.stack(everyone).sum(0))
        tensor = strided(world, world.rank)[i]
        dist.broadcast(tensor, 0, group=ours)
        assert torch.equal(tensor, everyone[0])
        found = [strided(world, 5)[i] for _ in everyone]
        dist.all_gather(found, everyone[world.rank], group=ours)
        assert all(map(torch.equal, found, everyone))
        out = strided(world, 5)[i]
        dist.reduce_scatter(out, [everyone[world.rank]] * world.size, group=ours)
        assert torch.equal(out, torch.stack(everyone).sum(0))
        swapped = [strided(world, 5)[i] for _ in everyone]
        dist.all_to_all(swapped, [everyone[world.rank]] * world.size, group=ours)
        assert all(map(torch.equal, swapped, everyone))


def test_uneven_all_to_all(world: sc.World, ours: Any) -> None:
    gives = [(world.rank + r) % 3 for r in range(world.size)]
    data = torch.arange(sum(gives) * 2, dtype=torch.int64).view(-1, 2) + 1000 * world.rank
    out = torch.empty(sum(gives), 2, dtype=torch.int64)  # as many come as go
    dist.all_to_all_single(out, data, gives, gives, group=ours)
    for r, part in enumerate(out.split(gives)):
        theirs = [(r + q) % 3 for q in range(world.size)]
        start = sum(theirs[: world.rank]) * 2
        assert torch.equal(part.reshape(-1), torch.arange(start, start + part.numel(), dtype=torch.int64) + 1000 * r)


def test_coalesced_calls(world: sc.World, ours: Any) -> None:
    tensors = [torch.full((n,), float(world.rank), dtype=torch.float32) for n in (3, 0, 500)]
    ours.allreduce_coalesced(tensors).wait()
    assert all(bool((t == sum(range(world.size))).all()) for t in tensors)
    with dist._coalescing_manager(group=ours, async_ops=True) as manager:
        inputs = [torch.full((n,), float(world.rank), dtype=torch.float32) for n in (2, 3)]
        outputs = [torch.empty(n * world.size, dtype=torch.float32) for n in (2, 3)]
        for out, mine in zip(outputs, inputs, strict=True):
            dist.all_gather_into_tensor(out, mine, group=ours)
    manager.wait()
    for n, out in zip((2, 3), outputs, strict=True):
        assert out.tolist() == [float(r) for r in range(world.size) for _ in range(n)]
    with dist._coalescing_manager(group=ours):
        parts = [torch.empty(n, dtype=torch.float32) for n in (2, 3)]
        for part in parts:
            dist.reduce_scatter_tensor(part, torch.ones(part.numel() * world.size, dtype=torch.float32), group=ours)
    assert all(bool((part == world.size).all()) for part in parts)


def test_objects(world: sc.World, ours: Any) -> None:
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, {"rank": world.rank}, group=ours)
    assert found == [{"rank": r} for r in range(world.size)]
    told = [f"from {world.rank}"]
    dist.broadcast_object_list(told, world.size - 1, group=ours)
    assert told == [f"from {world.size - 1}"]
    got: list[Any] = [None]
    dist.scatter_object_list(got, list(range(world.size)) if world.rank == 0 else None, 0, group=ours)
    assert got == [world.rank]


def test_messages_with_tags_in_any_order(world: sc.World, ours: Any) -> None:
    if world.size == 1:
        return
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    received = [torch.zeros(n, dtype=torch.int64) for n in (1, 0, 5000)]
    receives = [dist.irecv(t, before, group=ours, tag=9 - i) for i, t in enumerate(received)]
    sends = [
        dist.isend(torch.full((n,), 10 * world.rank + i, dtype=torch.int64), after, group=ours, tag=9 - i)
        for i, n in reversed(list(enumerate((1, 0, 5000))))
    ]
    for work in [*sends, *receives]:
        work.wait(timedelta(seconds=30))
    assert all(bool((t == 10 * before + i).all()) for i, t in enumerate(received))


def test_more_receives_wait_than_collectives_may(world: sc.World, ours: Any) -> None:
    if world.size == 1:
        return
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    received = [torch.zeros(3, dtype=torch.float32) for _ in range(100)]
    receives = [dist.irecv(t, before, group=ours, tag=i) for i, t in enumerate(received)]
    total = torch.ones(4, dtype=torch.float32)
    dist.all_reduce(total, group=ours)
    sends = [dist.isend(torch.full((3,), float(i), dtype=torch.float32), after, group=ours, tag=i) for i in range(100)]
    for work in [*receives, *sends]:
        work.wait()
    assert all(bool((t == i).all()) for i, t in enumerate(received))
    assert bool((total == world.size).all())


def test_messages_from_any_rank(world: sc.World, ours: Any) -> None:
    if world.rank == 0:
        seen = set()
        for _ in range(world.size - 1):
            tensor = torch.zeros(3, dtype=torch.int32)
            source = dist.recv(tensor, group=ours, tag=4)
            assert tensor.tolist() == [source] * 3
            seen.add(source)
        assert seen == set(range(1, world.size))
    else:
        dist.send(torch.full((3,), world.rank, dtype=torch.int32), 0, group=ours, tag=4)


def test_batched_messages(world: sc.World, ours: Any) -> None:
    if world.size == 1:
        return
    others = [r for r in range(world.size) if r != world.rank]
    received = {r: torch.zeros(2, dtype=torch.bfloat16) for r in others}
    mine = torch.full((2,), float(world.rank), dtype=torch.bfloat16)
    batch = [dist.P2POp(dist.irecv, received[r], r, group=ours) for r in others]
    batch += [dist.P2POp(dist.isend, mine, r, group=ours) for r in others]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    assert all(received[r].tolist() == [r, r] for r in others)


def test_messages_longer_than_a_piece(world: sc.World, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "_PIECE", 1000)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        n = 5003
        everyone = [values(r, n, dtype) for r in range(world.size)]
        tensor = everyone[world.rank].clone()
        dist.all_reduce(tensor, group=ours)
        close(tensor, torch.stack(everyone).sum(0).to(dtype))
        dist.broadcast(everyone[world.rank], 0, group=ours)
        assert same(everyone[world.rank], everyone[0])
    if world.rank == 0:
        for _ in range(world.size - 1):
            tensor = torch.zeros(3333, dtype=torch.int32)
            source = dist.recv(tensor, group=ours)
            assert bool((tensor == source).all())
    else:
        dist.send(torch.full((3333,), world.rank, dtype=torch.int32), 0, group=ours)
    dist.barrier(group=ours)
