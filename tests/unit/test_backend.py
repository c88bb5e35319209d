"""The backend's generators between simulated ranks, its tags and slots, and its Work, without MPI."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparsecomm as sc
from sparsecomm.backend import checking, meeting, moves, sums
from sparsecomm.backend.octets import Flat, check_tensors, octets
from sparsecomm.backend.reduction import Reduction
from sparsecomm.backend.sparse import sum_sparse
from sparsecomm.backend.tags import Slots, TagSpace
from sparsecomm.backend.work import EngineWork, JoinedWork
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import AgreedError, SimulatedWorld

SIZES = [1, 2, 3, 4, 5, 8, 9]


def run(size: int, make: Callable[[Any], Any], **options: Any) -> list[Any]:
    return SimulatedWorld(size).run(make, **options)


def vectors(size: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(size + n)
    return [torch.randn(n, generator=g, dtype=torch.float64).mul(9).to(dtype) for _ in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_sums_have_the_same_bits_on_all_ranks(size: int, dtype: torch.dtype) -> None:
    for n in (0, 1, size, 5000):
        parts = vectors(size, n, dtype)
        works = [p.clone() for p in parts]
        reduction = Reduction(dist.ReduceOp.SUM, dtype, size)
        run(size, lambda c, w=works, r=reduction: sums.allreduce(c, w[c.rank], r, Arena()))
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        total = parts[0].to(wide, copy=True)
        for part in parts[1:]:
            total += part.to(wide)
        torch.testing.assert_close(works[0], total.to(dtype))
        assert all(torch.equal(octets(w), octets(works[0])) for w in works)


@pytest.mark.parametrize("size", SIZES)
def test_reduce_leaves_other_ranks_alone(size: int) -> None:
    for n, root in itertools.product((0, 1, 5000), {0, size - 1}):
        parts = vectors(size, n, torch.float64)
        works = [p.clone() for p in parts]
        reduction = Reduction(dist.ReduceOp.MAX, torch.float64, size)
        run(size, lambda c, w=works, r=root, op=reduction: sums.reduce_to(c, w[c.rank], r, op, Arena()))
        for rank, work in enumerate(works):
            assert torch.equal(work, torch.stack(parts).amax(0) if rank == root else parts[rank])


@pytest.mark.parametrize("size", SIZES)
def test_moves(size: int) -> None:
    blocks = [torch.full((r % 3,), r, dtype=torch.uint8) for r in range(size)]  # some are empty
    found = [[torch.zeros_like(b) for b in blocks] for _ in range(size)]
    for rank in range(size):
        found[rank][rank].copy_(blocks[rank])
    run(size, lambda c: moves.gather_all(c, blocks[c.rank], found[c.rank]))
    assert all(all(map(torch.equal, row, blocks)) for row in found)
    for root in {0, size - 1}:
        got = [torch.zeros_like(b) for b in blocks]
        run(size, lambda c, r=root, g=got: moves.scatter_from(c, g[c.rank], blocks, r))
        assert all(torch.equal(g, b) for r, (g, b) in enumerate(zip(got, blocks, strict=True)) if r != root)
        data = [torch.full((5,), r, dtype=torch.uint8) for r in range(size)]
        run(size, lambda c, r=root, d=data: moves.spread(c, d[c.rank], r))
        assert all(d.tolist() == [root] * 5 for d in data)


@pytest.mark.parametrize("size", SIZES)
def test_nobody_passes_the_barrier_before_the_last_has_come(size: int) -> None:
    here: list[int] = []

    def one(channel: Any) -> Any:
        here.append(channel.rank)
        yield from moves.barrier(channel)
        return len(here)

    assert run(size, one) == [size] * size


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_debug_mode_tells_all_ranks_both_sides(size: int) -> None:
    outcomes = run(size, lambda c: checking.compare(c, "a" if c.rank == 0 else "b"), return_exceptions=True)
    rest = ", ".join(map(str, range(1, size)))
    for outcome in outcomes:
        assert isinstance(outcome, AgreedError)
        assert isinstance(outcome.cause, sc.CollectiveMismatch)
        assert f"rank 0 calls a; rank {rest} calls b" in str(outcome.cause)
    assert run(size, lambda c: checking.compare(c, "a")) == [None] * size


def test_the_meeting_of_all_ends_well() -> None:
    assert run(4, lambda c: meeting.meet(c, 10.0, True)) == [None] * 4


@pytest.mark.parametrize("size", SIZES)
def test_sparse_sums(size: int) -> None:
    dense = [torch.zeros(6, 3, dtype=torch.float32) for _ in range(size)]
    for rank, one in enumerate(dense):
        one[rank % 6] += rank + 1
        one[0] += 1
    works = [d.to_sparse(1) for d in dense]
    run(size, lambda c: sum_sparse(c, works[c.rank]))
    for work in works:
        assert work.is_coalesced()
        torch.testing.assert_close(work.to_dense(), torch.stack(dense).sum(0))


# --- tags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tag", [32767, 2**23 - 1, 2**28 - 1, 2**31 - 1])
def test_tags_of_groups_are_apart_and_fit(max_tag: int) -> None:
    space = TagSpace.of(max_tag)
    engine = 1 << min(max_tag.bit_length() - 1, 30)  # the engine's own are below
    for slot in (1, 2, space.slots - 1):
        most = space.width // 2 - 1
        found = [make(slot, tag) for make in (space.collective, space.message) for tag in (0, most)]
        assert sorted(set(found)) == found
        assert engine <= found[0]
        assert found[-1] <= max_tag
        assert found[-1] < space.collective(slot + 1, 0)
        assert space.collective(slot, most + 1) == found[0]
    assert engine <= space.making("any name") < space.collective(1, 0)
    for bad in (-1, space.width // 2):
        with pytest.raises(sc.ConfigError, match=f"tag = {bad}"):
            space.message(1, bad)


def test_ranks_agree_on_a_slot_that_is_free_on_all() -> None:
    slots = [Slots(8) for _ in range(3)]
    assert run(3, lambda c: slots[c.rank].agree(c)) == [1, 1, 1]
    assert run(1, lambda c: slots[2].agree(c)) == [2]
    assert run(2, lambda c: slots[c.rank].agree(c)) == [2, 2]  # rank 2 is not in it
    assert run(3, lambda c: slots[c.rank].agree(c)) == [3, 3, 3]
    for one in slots:
        one.give_back(1)
    assert run(3, lambda c: slots[c.rank].agree(c)) == [1, 1, 1]
    for expected in (4, 5, 6, 7):
        assert run(3, lambda c: slots[c.rank].agree(c)) == [expected] * 3
    with pytest.raises(sc.TransportError, match="no tags are left"):
        run(3, lambda c: slots[c.rank].agree(c))


# --- tensors --------------------------------------------------------------------------------------------------------


def test_only_what_must_be_copied_is() -> None:
    plain = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert Flat([plain]).vector.data_ptr() == plain.data_ptr()
    turned = plain.t()
    flat = Flat([turned, plain])
    assert flat.vector.tolist() == [0, 3, 1, 4, 2, 5, 0, 1, 2, 3, 4, 5]
    flat = Flat([turned], read=False)
    flat.vector.copy_(torch.arange(6, dtype=torch.float32))
    flat.write()
    assert plain.tolist() == [[0, 2, 4], [1, 3, 5]]
    conjugate = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
    assert Flat([conjugate]).vector.tolist() == [1 - 2j]


def test_tensors_that_cannot_be_sent_are_refused() -> None:
    good = torch.zeros(2, dtype=torch.float32)
    for bad, words in (
        ([], "at least one tensor"),
        ([good, good.double()], "torch.float32 and torch.float64"),
        ([good.to("meta")], "meta"),
        ([good.to_sparse()], "sparse"),
    ):
        with pytest.raises(sc.ConfigError, match=words):
            check_tensors(bad, "all_reduce")


# --- work -----------------------------------------------------------------------------------------------------------


def test_work_ends_once() -> None:
    tensor = torch.zeros(1, dtype=torch.float32)
    work = EngineWork("test", [tensor])
    assert not work.is_completed()
    with pytest.raises(sc.CommTimeout, match="test has not ended"):
        work.wait(timedelta(milliseconds=1))
    work.succeed(3)
    work.fail(ValueError("too late"))
    assert work.wait()
    assert work.is_success()
    assert work.source_rank() == 3
    assert work.get_future().wait() == [tensor]


def test_work_that_failed_says_so_everywhere() -> None:
    work, good = EngineWork("test", []), EngineWork("good", [])
    early = work.get_future()
    work.fail(sc.CommTimeout("no answer"))
    good.succeed(None)
    for one in (work, JoinedWork([good, work])):
        assert one.is_completed()
        assert not one.is_success()
        assert "no answer" in str(one.exception())
        with pytest.raises(sc.CommTimeout, match="no answer"):
            one.wait()
        with pytest.raises(RuntimeError, match="no answer"):
            one.get_future().wait()
    with pytest.raises(RuntimeError, match="no answer"):
        early.wait()
