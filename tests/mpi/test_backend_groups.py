"""Process groups of the backend: several in flight, futures, waiting, barriers, training; a mix against Gloo.

SPARSECOMM_TEST_MIX=10000 sets the number of operations of the mix.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import TINY_BUCKETS, assert_replicas_equal, flat, grad_of, loss_of, mlp, train

import sparsecomm as sc
from sparsecomm.backend import checking

MIX = int(os.environ.get("SPARSECOMM_TEST_MIX", "500"))


@pytest.fixture(scope="module")
def ours(world: sc.World) -> Iterator[Any]:
    """A group of all ranks."""
    group = dist.new_group(backend="sparsecomm")
    yield group
    dist.destroy_process_group(group)


def full(value: float, n: int = 4) -> torch.Tensor:
    return torch.full((n,), float(value), dtype=torch.float32)


def test_groups_keep_apart_whatever_their_order(world: sc.World) -> None:
    groups = [dist.new_group(backend="sparsecomm") for _ in range(5)]
    order = list(range(5))
    random.Random(world.rank).shuffle(order)
    tensors = [full(10 * i + world.rank, 1000) for i in range(5)]
    works = [dist.all_reduce(tensors[i], group=groups[i], async_op=True) for i in order]
    for work in works:
        work.wait()
    for i, tensor in enumerate(tensors):
        assert bool((tensor == sum(10 * i + r for r in range(world.size))).all())
    for group in groups:
        dist.destroy_process_group(group)


def test_a_destroyed_group_gives_its_tags_back(world: sc.World) -> None:
    taken = set()
    for _ in range(50):
        group = dist.new_group(backend="sparsecomm")
        taken.add(group._slot)
        dist.barrier(group=group)
        dist.destroy_process_group(group)
    assert len(taken) < 5


def test_part_of_the_ranks(world: sc.World) -> None:
    members = [r for r in range(world.size) if r != 1] or [0]
    group = dist.new_group(members, backend="sparsecomm")
    if world.rank in members:
        tensor = full(world.rank)
        dist.all_reduce(tensor, group=group)
        assert bool((tensor == sum(members)).all())
        root = members[-1]
        tensor = full(world.rank)
        dist.broadcast(tensor, root, group=group)
        assert bool((tensor == root).all())
        if len(members) > 1:
            if world.rank == members[0]:
                assert dist.recv(tensor, group=group) in members[1:]
                for _ in members[2:]:
                    dist.recv(tensor, group=group)
            else:
                dist.send(tensor, members[0], group=group)
    alone = dist.new_group([world.rank], backend="sparsecomm", use_local_synchronization=True)
    tensor = full(3.0)
    dist.all_reduce(tensor, dist.ReduceOp.AVG, group=alone)
    assert tensor.tolist() == [3.0] * 4


def test_work_goes_on_without_the_caller(world: sc.World, ours: Any) -> None:
    tensor = full(1.0)
    dist.all_reduce(tensor, group=ours, async_op=True)  # nobody keeps the handle
    work = dist.all_reduce(full(1.0), group=ours, async_op=True)
    until = time.monotonic() + 20
    while not work.is_completed() and time.monotonic() < until:
        time.sleep(0.001)
    assert work.is_success()
    assert work.exception() is None
    assert work.result()[0].tolist() == tensor.tolist() == [world.size] * 4


def test_waiting_gives_up_without_ending_the_operation(world: sc.World, ours: Any) -> None:
    if world.size == 1:
        return
    tensor = full(1.0)
    if world.rank == 0:
        work = dist.all_reduce(tensor, group=ours, async_op=True)
        with pytest.raises(sc.CommTimeout, match="has not ended after"):
            work.wait(timedelta(milliseconds=50))
        dist.barrier()
        work.wait()
    else:
        dist.barrier()
        dist.all_reduce(tensor, group=ours)
    assert tensor.tolist() == [world.size] * 4


def test_futures_have_the_result_and_run_callbacks(world: sc.World, ours: Any) -> None:
    tensor = full(world.rank)
    work = dist.all_reduce(tensor, dist.ReduceOp.AVG, group=ours, async_op=True)
    doubled = work.get_future().then(lambda future: future.value()[0] * 2)
    assert doubled.wait().tolist() == [float(world.size - 1)] * 4
    assert work.get_future().value()[0] is tensor


def hold_the_engine(group: Any, gate: threading.Event) -> None:
    """Keeps the engine's thread in a callback until `gate` is set: no operation ends before that.

    A callback of an operation that has ended already runs on the thread that adds it, so it may take several tries.
    """
    caller = threading.get_ident()
    held = threading.Event()

    def hold(_: Any) -> None:
        if threading.get_ident() != caller:
            held.set()
            assert gate.wait(20)

    for _ in range(1000):
        dist.all_reduce(full(1.0), group=group, async_op=True).get_future().then(hold)
        if held.wait(0.01):
            return
    raise AssertionError("no operation was still in progress when its callback was added")


def test_a_callback_that_waits_for_another_operation_is_told(world: sc.World, ours: Any) -> None:
    alone = dist.new_group([world.rank], backend="sparsecomm", use_local_synchronization=True)
    gate = threading.Event()

    def wait_there(_: Any) -> None:
        dist.all_reduce(full(1.0), group=alone)

    hold_the_engine(alone, gate)
    late = dist.all_reduce(full(1.0), group=alone, async_op=True).get_future().then(wait_there)
    gate.set()
    with pytest.raises(RuntimeError, match="cannot wait for it"):
        late.wait()
    dist.barrier(group=ours)


def test_inference_mode(world: sc.World, ours: Any) -> None:
    with torch.inference_mode():
        tensor = full(1.0)
        dist.all_reduce(tensor, group=ours)
        parts = [torch.empty(2, 2, dtype=torch.float64).t() for _ in range(world.size)]
        dist.all_gather(parts, torch.ones(2, 2, dtype=torch.float64), group=ours)
    assert tensor.tolist() == [world.size] * 4
    weight = torch.nn.Parameter(full(world.rank))
    dist.broadcast(weight, 0, group=ours)
    assert weight.tolist() == [0.0] * 4
    assert weight.requires_grad


def test_the_monitored_barrier_names_who_is_missing_and_the_group_lives_on(world: sc.World, ours: Any) -> None:
    ours.monitored_barrier(timedelta(seconds=20))
    if world.size == 1:
        return
    if world.rank == world.size - 1:
        time.sleep(1.0)
        with pytest.raises(sc.CommTimeout):
            ours.monitored_barrier(timedelta(milliseconds=200))
    else:
        words = f"Rank {world.size - 1} failed to pass" if world.rank == 0 else "send/recv from rank 0"
        with pytest.raises(sc.CommTimeout, match=words):
            ours.monitored_barrier(timedelta(milliseconds=200), wait_all_ranks=True)
    tensor = full(1.0)
    dist.all_reduce(tensor, group=ours)
    assert tensor.tolist() == [world.size] * 4


def test_a_deadline_ends_its_group_alone(world: sc.World, ours: Any) -> None:
    group = dist.new_group(backend="sparsecomm", timeout=timedelta(seconds=1))
    dist.barrier(group=group)
    if world.size > 1 and world.rank != world.size - 1:
        with pytest.raises(sc.CommTimeout, match=f"within the timeout of 1 s; late: .*rank {world.size - 1}"):
            dist.all_reduce(full(1.0), group=group)
        with pytest.raises(sc.TransportError, match="communication failed before"):
            dist.all_reduce(full(1.0), group=group)
    slot = group._slot
    dist.destroy_process_group(group)
    tensor = full(1.0)
    dist.all_reduce(tensor, group=ours)
    assert tensor.tolist() == [world.size] * 4
    again = dist.new_group(backend="sparsecomm")
    tensor = full(2.0)
    dist.all_reduce(tensor, group=again)  # the messages of the group that failed are not taken for those of this one
    assert tensor.tolist() == [2.0 * world.size] * 4
    assert world.size == 1 or again._slot != slot
    dist.destroy_process_group(again)


def test_a_message_of_another_length_ends_its_group_alone(world: sc.World, ours: Any) -> None:
    if world.size == 1:
        return
    group = dist.new_group(backend="sparsecomm", timeout=timedelta(seconds=20))
    if world.rank == 0:
        with pytest.raises(sc.TransportError, match="a message of 12 bytes arrived instead"):
            dist.recv(full(0.0), 1, group=group)
    elif world.rank == 1:
        dist.send(full(1.0, 3), 0, group=group)
    tensor = full(1.0)
    dist.all_reduce(tensor, group=ours)
    assert tensor.tolist() == [world.size] * 4
    dist.destroy_process_group(group)


def test_the_debug_mode_finds_mismatches(world: sc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "is_wanted", lambda: True)
    group = dist.new_group(backend="sparsecomm")
    for _ in range(3):
        if world.size > 1:
            with pytest.raises(sc.CollectiveMismatch, match=r"rank 0 calls all_reduce\(\(5,\) float32, SUM\)"):
                dist.all_reduce(full(1.0, 5 if world.rank == 0 else 6), group=group)
        tensor = full(1.0)
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [world.size] * 4
        found = [full(0.0, r + 1) for r in range(world.size)]
        dist.all_gather(found, full(world.rank, world.rank + 1), group=group)  # shapes that all ranks know
        assert all(bool((t == r).all()) for r, t in enumerate(found))


# --- training -------------------------------------------------------------------------------------------------------


def wrapped(group: Any, state: sc.SparseState | None) -> DistributedDataParallel:
    ddp = DistributedDataParallel(mlp(), process_group=group, bucket_cap_mb=TINY_BUCKETS)
    if state is not None:
        ddp.register_comm_hook(state, sc.sparse_hook)
    return ddp


def test_plain_ddp_has_the_gradients_of_gloo(world: sc.World, ours: Any) -> None:
    a, b = wrapped(ours, None), wrapped(None, None)
    for step in range(4):
        for ddp in (a, b):
            ddp.zero_grad()
            loss_of(ddp, step).backward()
        torch.testing.assert_close(flat(a, grad_of), flat(b, grad_of))
    assert_replicas_equal(a)


@pytest.mark.parametrize("collective", ["auto", "allgather", "split_reduce"])
def test_the_hook_has_the_bits_that_it_has_beside_gloo(world: sc.World, ours: Any, collective: str) -> None:
    models = [wrapped(g, sc.SparseState(sc.TopK(0.1), collective=collective)) for g in (ours, None)]
    for ddp in models:
        for _ in train(ddp, 5):
            pass
        assert_replicas_equal(ddp)
    if collective != "auto":
        assert torch.equal(flat(models[0], lambda p: p), flat(models[1], lambda p: p))


def test_native_sums_go_over_it(world: sc.World, ours: Any) -> None:
    ddp = wrapped(ours, sc.SparseState(sc.Dense(), collective="native"))
    plain = wrapped(None, None)
    for step in range(5):
        for one in (ddp, plain):
            one.zero_grad()
            loss_of(one, step).backward()
        torch.testing.assert_close(flat(ddp, grad_of), flat(plain, grad_of))
    for p in ddp.parameters():
        p.grad = None
    (loss_of(ddp, 5) * float("nan")).backward()
    assert bool(flat(ddp, grad_of).isnan().all())


# --- a mix ----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]


class Mix:
    """Random operations of one group, the same on all its ranks, each to be run over any backend."""

    def __init__(self, members: list[int], seed: int) -> None:
        self.members, self._random = members, random.Random(seed)
        self.mine = members.index(dist.get_rank()) if dist.get_rank() in members else -1

    def operation(self) -> tuple[str, int, torch.dtype, int, int]:
        r = self._random
        name = r.choice(
            [
                "all_reduce",
                "broadcast",
                "all_gather",
                "reduce",
                "reduce_scatter",
                "all_to_all",
                "gather",
                "scatter",
                "ring",
                "barrier",
            ]
        )
        n = r.choice([0, 1, 7, 100, 5000, 40_000])
        return name, n, r.choice(DTYPES), r.randrange(len(self.members)), r.randrange(1 << 30)

    def start(self, group: Any, operation: tuple[str, int, torch.dtype, int, int]) -> tuple[list[Any], list[Any]]:
        """Starts an operation; returns works and outputs."""
        name, n, dtype, root, seed = operation
        size, me = len(self.members), self.mine
        g = torch.Generator().manual_seed(seed + me)
        make = lambda: torch.randint(0, 9, (n,), generator=g, dtype=torch.int64).to(dtype)  # noqa: E731
        blank = lambda: torch.zeros(n, dtype=dtype)  # noqa: E731
        top = self.members[root]
        if name == "barrier":
            return [dist.barrier(group=group, async_op=True)], []
        if name == "ring":
            if size == 1:
                return [], []
            out, give = blank(), make()
            after, before = self.members[(me + 1) % size], self.members[(me - 1) % size]
            return [dist.irecv(out, before, group=group, tag=root), dist.isend(give, after, group=group, tag=root)], [
                out,
                give,
            ]
        x = make()
        outs = [blank() for _ in range(size)]
        options: dict[str, Any] = {"group": group, "async_op": True}
        if name == "all_reduce":
            return [dist.all_reduce(x, **options)], [x]
        if name == "broadcast":
            return [dist.broadcast(x, top, **options)], [x]
        if name == "reduce":
            return [dist.reduce(x, top, **options)], [x] if me == root else []
        if name == "all_gather":
            return [dist.all_gather(outs, x, **options)], outs
        if name == "gather":
            return [dist.gather(x, outs if me == root else None, top, **options)], outs if me == root else []
        ins = [make() for _ in range(size)]
        if name == "scatter":
            return [dist.scatter(x, ins if me == root else None, top, **options)], [x]
        if name == "reduce_scatter":
            return [dist.reduce_scatter(x, ins, **options)], [x, *ins]
        return [dist.all_to_all(outs, ins, **options)], [*outs, *ins]


ROUND = 300  # operations, whose results are kept until Gloo has done the same


def test_a_mix_of_operations_in_overlapping_groups_equals_gloo(world: sc.World) -> None:
    size = world.size
    members = [list(range(size)), [r for r in range(size) if r != 1] or [0], list(range(size // 2, size))]
    mixes = [Mix(m, 5 + i) for i, m in enumerate(members)]
    ours = [dist.new_group(m, backend="sparsecomm") for m in members]
    gloo = [dist.new_group(m, backend="gloo") for m in members]
    order = random.Random(1000 + world.rank)  # each rank turns to its groups in an order of its own
    for _ in range(-(-MIX // ROUND)):
        operations = [[mix.operation() for _ in range(ROUND // 3)] for mix in mixes]
        here = [i for i, mix in enumerate(mixes) if mix.mine >= 0]
        results = in_any_order(mixes, ours, {i: operations[i] for i in here}, order)
        for i in here:
            for operation, found in zip(operations[i], results[i], strict=True):
                works, expected = mixes[i].start(gloo[i], operation)
                for work in works:
                    work.wait()
                assert all(map(torch.equal, found, expected)), (members[i], operation, found, expected)
        dist.barrier()
    for group in (*ours, *gloo):
        dist.destroy_process_group(group)


def in_any_order(mixes: list[Mix], groups: list[Any], operations: dict[int, list[Any]], order: random.Random) -> Any:
    """Starts the operations of each group in their order, and those of different groups in any; returns the outputs."""
    left = {i: list(these) for i, these in operations.items()}
    results: dict[int, list[Any]] = {i: [] for i in operations}
    flying: list[Any] = []
    while any(left.values()):
        i = order.choice([i for i, these in left.items() if these])
        works, outputs = mixes[i].start(groups[i], left[i].pop(0))
        results[i].append(outputs)
        flying += works
        if order.random() < 0.05:  # to wait for others here could be a circle
            for work in [work for work in flying if work.is_completed()]:
                work.wait()
                flying.remove(work)
    order.shuffle(flying)
    for work in flying:
        work.wait()
    return results
