"""dist.init_process_group("sparsecomm") in various circumstances; the argument says which. Prints "ok" and the rank."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc


def error_of(kind: type[Exception], action: Callable[[], object]) -> Any:
    """The error of an action that must fail."""
    try:
        action()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def step_of(state: sc.SparseState | None = None) -> torch.Tensor:
    """The averaged gradient of a step of a DDP model."""
    torch.manual_seed(3)
    ddp = DistributedDataParallel(torch.nn.Linear(40, 20))
    if state is not None:
        ddp.register_comm_hook(state, sc.sparse_hook)
    ddp(torch.full((1, 40), float(dist.get_rank()))).sum().backward()
    return ddp.module.weight.grad


def start() -> None:
    """Starts without an address, trains, is destroyed, and starts again; sc.init() joins the same world."""
    for _ in range(3):
        dist.init_process_group("sparsecomm")
        size = dist.get_world_size()
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [size] * 3
        mean = torch.full((20, 40), (size - 1) / 2)
        torch.testing.assert_close(step_of(), mean)
        world = sc.init()
        assert (world.rank, world.size) == (dist.get_rank(), size)
        torch.testing.assert_close(step_of(sc.SparseState(sc.Dense())), mean)
        torch.testing.assert_close(step_of(sc.SparseState(sc.Dense(), collective="native")), mean)
        world.barrier()
        dist.destroy_process_group()


def address() -> None:
    """Starts by the backend's own address, also without a launcher."""
    dist.init_process_group("sparsecomm", init_method="sparsecomm://")
    assert step_of().shape == (20, 40)
    dist.destroy_process_group()


def neighbours() -> None:
    """A Gloo group beside ours finds its store, though nobody gave one."""
    dist.init_process_group("sparsecomm")
    gloo = dist.new_group(backend="gloo")
    total = torch.ones(3)
    dist.all_reduce(total, group=gloo)
    assert total.tolist() == [dist.get_world_size()] * 3
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    part = dist.new_group([0])
    if dist.get_rank() == 0:
        dist.barrier(group=part)
    dist.destroy_process_group()


def leave() -> None:
    """Rank 1 leaves while the others wait: they are told which, in a collective, a message and a group."""
    dist.init_process_group("sparsecomm")
    rank = dist.get_rank()
    dist.barrier()
    if rank == 1:
        raise ValueError("the dog ate the batch")
    begun = time.monotonic()
    works = [dist.all_reduce(torch.ones(3), async_op=True), dist.irecv(torch.ones(3), 1)]
    error = error_of(sc.RankLeft, works[0].wait)
    assert error.rank == 1
    assert "the dog ate the batch" in str(error)
    assert time.monotonic() - begun < 5
    for work in works:
        error_of(sc.TransportError, work.wait)
        assert work.exception() is not None
        error_of(RuntimeError, work.get_future().wait)
    sys.stdout.write(f"ok {rank}\n")
    sys.stdout.flush()


def late() -> None:
    """Rank 0 does not come in time: all ranks name it."""
    dist.init_process_group("sparsecomm", timeout=timedelta(seconds=2))
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(6)
        return
    error = error_of(sc.CommTimeout, lambda: dist.all_reduce(torch.ones(3)))
    assert "did not finish within the timeout of 2 s; late: rank 0" in str(error), error


def mismatch() -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL: ranks that call different things all learn who calls what, and go on."""
    dist.init_process_group("sparsecomm")
    rank, size = dist.get_rank(), dist.get_world_size()
    for first, others, words in (
        (lambda: dist.all_reduce(torch.ones(3)), lambda: dist.all_reduce(torch.ones(4)), "(3,) float32|(4,) float32"),
        (
            lambda: dist.all_reduce(torch.ones(3)),
            lambda: dist.all_reduce(torch.ones(3, dtype=torch.float64)),
            "all_reduce((3,) float32|all_reduce((3,) float64",
        ),
        (
            lambda: dist.all_reduce(torch.ones(3)),
            lambda: dist.all_reduce(torch.ones(3), dist.ReduceOp.MAX),
            "float32, SUM|float32, MAX",
        ),
        (lambda: dist.barrier(), lambda: dist.broadcast(torch.ones(3), 0), "barrier()|broadcast("),
        (lambda: dist.broadcast(torch.ones(3), 1), lambda: dist.broadcast(torch.ones(3), 0), "rank 1)|rank 0)"),
    ):
        text = str(error_of(sc.CollectiveMismatch, first if rank == 0 else others))
        assert all(word in text for word in words.split("|")), text
        assert "rank 0 calls" in text, text
        assert f"rank {', '.join(map(str, range(1, size)))} calls" in text, text
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [size] * 3


def closed() -> None:
    """A destroyed group and a finished engine refuse further calls."""
    dist.init_process_group("sparsecomm")
    group = dist.group.WORLD
    dist.destroy_process_group()
    assert "was destroyed" in str(error_of(sc.TransportError, group.barrier))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    if sys.argv[1] != "leave":
        sys.stdout.write(f"ok {rank}\n")  # in one piece, since all ranks may share one file
