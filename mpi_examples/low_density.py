"""Train at a density of 0.1%, which falls from 25% in the first half of the run.

    mpirun -n 2 python mpi_examples/low_density.py --steps 200 --density 0.001

In a short run at a low density most elements would wait until its end. The first steps matter most, so they send more.
"""

from __future__ import annotations

import argparse

import torch
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc


def main() -> None:
    """Trains, and prints the loss and the bytes saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.001, help="share sent at the end (default %(default)s)")
    options = parser.parse_args()

    world = sc.init()
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)
    training, held_out = load_text()
    model = TinyGPT()
    ddp = DistributedDataParallel(model)
    # The density falls from 25% to the final one over half the run.
    preset = sc.preset("adamw", density=options.density, warmup_steps=max(1, options.steps // 2))
    state = sc.SparseState(preset.change(collective="allgather"))
    ddp.register_comm_hook(state, sc.sparse_hook)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=2e-3)

    for step in range(options.steps):
        optimizer.zero_grad()
        loss = ddp(*random_batch(training, world.rank, step))
        loss.backward()
        optimizer.step()
        if world.rank == 0 and (step + 1) % 20 == 0:
            sent = state.last_step()
            print(f"step {step + 1}: training loss {loss.item():.3f}, density {sent.density:.4f}", flush=True)

    if world.rank == 0:
        with torch.no_grad():
            loss = model(*random_batch(held_out, 0, batch=256))
        print(f"held-out loss {loss.item():.3f} nats per byte")
        print(f"{state.metrics().ratio:.1f} times fewer bytes than dense, warm-up included")


if __name__ == "__main__":
    main()
