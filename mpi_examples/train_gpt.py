"""Train a small GPT with DDP, each rank sending 1% of its gradient.

    mpirun -n 2 python mpi_examples/train_gpt.py --steps 200 --density 0.01

An ordinary DDP script, but for the five numbered lines.
"""

from __future__ import annotations

import argparse

import torch
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc  # (1)


def main() -> None:
    """Trains, and prints the loss and the bytes saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.01, help="share of the gradient sent (default %(default)s)")
    options = parser.parse_args()

    world = sc.init()  # (2) in place of dist.init_process_group
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)
    training, held_out = load_text()
    model = TinyGPT()

    ddp = DistributedDataParallel(model)
    # Without `collective`, sparsecomm measures the link; on one machine it may find that sending everything is faster.
    state = sc.SparseState(sc.TopK(density=options.density), collective="allgather")  # (3)
    ddp.register_comm_hook(state, sc.sparse_hook)  # (4)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=2e-3, max_norm=1.0)  # (5) clips, too

    for step in range(options.steps):
        inputs, targets = random_batch(training, world.rank, step)
        optimizer.zero_grad()
        loss = ddp(inputs, targets)
        loss.backward()
        optimizer.step()
        if world.rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: training loss {loss.item():.3f}", flush=True)

    if world.rank == 0:
        with torch.no_grad():
            loss = model(*random_batch(held_out, 0, batch=256))
        print(f"held-out loss {loss.item():.3f} nats per byte")
        metrics = state.metrics()
        print(f"{metrics.bytes_sent:,} bytes sent by this rank, {metrics.ratio:.1f} times fewer than dense")


if __name__ == "__main__":
    main()
