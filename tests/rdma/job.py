"""Trains with the hook, then does one-sided Get and Accumulate. Every rank checks its results and prints its bytes.

Prints "hook: B bytes sent by rank R" and "windows: B bytes moved by rank R".
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

STEPS = 3
WINDOW = 1 << 15  # float64 a rank: over UCX's eager sizes, so that both of its protocols run


def say(text: str) -> None:
    """Prints a line in one write, since all ranks share one console."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def train(world: sc.World) -> None:
    """Runs a dense step and then steps at density 10%. Replicas must agree bit for bit, and nothing may be lost."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 64, dtype=torch.float32)
    ddp = DistributedDataParallel(model)
    state = sc.SparseState(sc.TopK(0.1), collective="allgather", value_codec="fp32", dense_steps=1)
    ddp.register_comm_hook(state, sc.sparse_hook)
    torch.manual_seed(world.rank)
    total = torch.zeros_like(model.weight)  # of this rank's gradients, which depend on the data alone
    applied = torch.zeros_like(model.weight)
    for _ in range(STEPS):
        batch = torch.randn(8, 256, dtype=torch.float32)
        ddp.zero_grad()
        ddp(batch).sum().backward()
        total += batch.sum(0).expand_as(total)
        assert model.weight.grad is not None
        applied += model.weight.grad
        with torch.no_grad():
            model.weight -= 0.1 * model.weight.grad
    kept = state.state_dict()["residual.weight"]
    books = torch.stack([total, kept.view_as(total)]).double()
    dist.all_reduce(books)  # over Gloo, which is not the transport under test
    torch.testing.assert_close(books[0], world.size * applied.double() + books[1], rtol=1e-4, atol=1e-4)
    weights = [torch.empty_like(model.weight) for _ in range(world.size)]
    dist.all_gather(weights, model.weight.detach().clone())
    assert all(torch.equal(w, weights[0]) for w in weights), "replicas differ"
    assert state.metrics().steps == STEPS
    say(f"hook: {state.metrics().bytes_sent} bytes sent by rank {world.rank}")


def one_sided(world: sc.World) -> None:
    """Every rank reads the window of its neighbour and adds to it. Both results are checked element by element."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()  # the engine uses another communicator, and is idle meanwhile
    window = MPI.Win.Allocate(8 * WINDOW, 8, comm=comm)
    mine = np.frombuffer(window.tomemory(), dtype=np.float64)
    start = np.arange(WINDOW, dtype=np.float64)
    mine[:] = start + world.rank
    neighbour = (world.rank + 1) % world.size
    comm.Barrier()
    got = np.zeros(WINDOW)
    window.Lock(neighbour, MPI.LOCK_SHARED)
    window.Get(got, neighbour)
    window.Unlock(neighbour)
    assert np.array_equal(got, start + neighbour), "Get brought other values"
    comm.Barrier()
    for r in range(world.size):
        window.Lock(r)
        window.Accumulate(start, r, op=MPI.SUM)
        window.Unlock(r)
    comm.Barrier()
    window.Lock(world.rank)
    assert np.array_equal(mine, start * (1 + world.size) + world.rank), "Accumulate lost an addition"
    window.Unlock(world.rank)
    window.Free()
    comm.Free()
    say(f"windows: {got.nbytes + (world.size - 1) * start.nbytes} bytes moved by rank {world.rank}")


if __name__ == "__main__":
    job_world = sc.init(timeout=300)
    train(job_world)
    one_sided(job_world)
