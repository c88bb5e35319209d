"""init in unusual circumstances; the argument says which. Prints "ok" and the rank where all is as it should be."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc
from sparsecomm.launch import detect


def message_of(kind: type[BaseException], action: Callable[..., object], *args: object, **options: object) -> str:
    """What an action that must fail says."""
    try:
        action(*args, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"{action} {args} {options} did not fail")


def step_of(model: torch.nn.Module) -> sc.SparseState:
    """One step of a DDP model with the hook."""
    ddp = DistributedDataParallel(model)
    state = sc.SparseState(sc.TopK(0.5))
    ddp.register_comm_hook(state, sc.sparse_hook)
    ddp(torch.ones(1, 4)).sum().backward()
    return state


def twice() -> None:
    """A second init returns the same world."""
    first = sc.init(timeout=20)
    assert sc.init() is first
    assert sc.world() is first
    assert sc.is_initialized()
    first.barrier()


def own_torch() -> None:
    """The user initialized torch.distributed, and may continue to use it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    port = comm.bcast(free_port() if comm.rank == 0 else None)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)
    group = dist.group.WORLD
    world = sc.init(timeout=20)
    assert dist.group.WORLD is group
    assert (world.rank, world.size, world.transport) == (comm.rank, comm.size, "mpi")
    assert step_of(torch.nn.Linear(4, 2)).step == 1
    sc.shutdown()
    assert dist.is_initialized(), "what the user brought up is the user's to take down"
    dist.barrier()
    dist.destroy_process_group()


def spawned(fails: str = "") -> None:
    """torch.multiprocessing.spawn starts the ranks, which bring torch.distributed up themselves: adopted."""
    torch.multiprocessing.spawn(rank_of_a_spawned_job, args=(free_port(), fails), nprocs=2)


def spawned_failure() -> None:
    """As before, and one of the ranks fails."""
    spawned("fails")


def rank_of_a_spawned_job(rank: int, port: int, fails: str) -> None:
    """One of two processes."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = sc.init(timeout=20)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (rank, 2, rank, 2)
    assert (world.transport, world.launcher) == ("gloo", "process group")
    step_of(torch.nn.Linear(4, 2))
    if fails and rank == 1:
        raise ValueError("the dog ate the batch")
    step_of(torch.nn.Linear(4, 2))
    dist.barrier()
    sc.shutdown()
    assert dist.is_initialized(), "what the user brought up is the user's to take down"
    dist.destroy_process_group()


def other_torch() -> None:
    """torch.distributed was brought up as another world: refused."""
    from torch.distributed import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    sc.init(timeout=20)


def free_port() -> int:
    """Returns a port that no process listens on."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def no_init() -> None:
    """The hook without init says what to call."""
    from torch.distributed import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    for action in (lambda: step_of(torch.nn.Linear(4, 2)), sc.world):
        assert "call sparsecomm.init()" in message_of(RuntimeError, action)
    dist.destroy_process_group()


def again() -> None:
    """shutdown and init once more: works, or says why not; never an MPI abort."""
    sc.init(timeout=20)
    sc.shutdown()
    assert not sc.is_initialized()
    sc.shutdown()
    if detect().mpi:
        assert "shutdown" in message_of(sc.LaunchError, sc.init)
    else:
        world = sc.init(timeout=20)
        assert step_of(torch.nn.Linear(4, 2)).step == 1
        assert world is sc.world()


def fork() -> None:
    """A forked child cannot communicate, is told so, and ends without ending the job or touching MPI."""
    world = sc.init(timeout=20)
    model = torch.nn.Linear(4, 2)
    step_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork with threads
        child = os.fork()
    if child == 0:
        refused = "forked" in message_of(sc.LaunchError, sc.init)
        refused &= "forked" in message_of(sc.TransportError, world.engine.call, "x", None)
        sc.shutdown()  # what atexit would call: it must know that it is in a child
        os._exit(0 if refused else 1)  # torch's Gloo cannot be destructed in a fork
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    step_of(model)


def bad_timeout() -> None:
    """SPARSECOMM_TIMEOUT is checked, by name and value."""
    for text in ("0", "-1", "soon", "nan", "inf", ""):
        os.environ["SPARSECOMM_TIMEOUT"] = text
        assert f"SPARSECOMM_TIMEOUT = {text!r}" in message_of(sc.ConfigError, sc.init)
    for value in (0, -1.0, float("nan"), "5", True):
        assert repr(value) in message_of(sc.ConfigError, sc.init, timeout=value)


def loader() -> None:
    """DataLoader workers are forked; training goes on around them and they end quietly."""
    sc.init(timeout=20)
    data = torch.utils.data.DataLoader(torch.arange(64.0).view(16, 4), batch_size=4, num_workers=2)
    ddp = DistributedDataParallel(torch.nn.Linear(4, 2))
    state = sc.SparseState(sc.TopK(0.5))
    ddp.register_comm_hook(state, sc.sparse_hook)
    for batch in data:
        ddp(batch).sum().backward()
    assert state.step == 4


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.stdout.write(f"ok {detect().rank}\n")  # in one piece, since all ranks may share one file
