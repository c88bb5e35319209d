"""Accumulate the gradients of several batches before each exchange.

    mpirun -n 2 python mpi_examples/accumulate.py --steps 20 --batches 4

``ddp.no_sync()`` goes around all backward passes but the last of a step, as in any DDP script. Those passes only add to
the gradient; the last one exchanges the sum, so that a step sends as many bytes as a step of one batch.
"""

from __future__ import annotations

import argparse
import contextlib

import torch
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc


def main() -> None:
    """Trains, and prints the loss and the bytes of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="updates (default %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="batches of a rank in each update (default %(default)s)")
    options = parser.parse_args()

    world = sc.init()
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)
    training, _ = load_text()
    model = TinyGPT()
    ddp = DistributedDataParallel(model)
    state = sc.SparseState(sc.TopK(density=0.01), collective="allgather")
    ddp.register_comm_hook(state, sc.sparse_hook)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=2e-3)

    for step in range(options.steps):
        optimizer.zero_grad()
        mean = 0.0
        for i in range(options.batches):
            last = i == options.batches - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                loss = ddp(*random_batch(training, world.rank, step, i)) / options.batches
                loss.backward()
            mean += loss.item()
        optimizer.step()
        if world.rank == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1}: training loss {mean:.3f}, {state.last_step().bytes_sent:,} bytes sent", flush=True)


if __name__ == "__main__":
    main()
