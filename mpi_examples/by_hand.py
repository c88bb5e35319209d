"""Average the gradients by hand, in a script without DDP.

    mpirun -n 2 python mpi_examples/by_hand.py --steps 60

``sc.allreduce_gradients`` goes between backward and the optimizer's step. It suits loops that cannot wrap their model
in DDP. The price is that nothing is sent while backward still runs.
"""

from __future__ import annotations

import argparse

import torch
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT

import sparsecomm as sc


def main() -> None:
    """Trains, and prints the loss and the bytes saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates (default %(default)s)")
    options = parser.parse_args()

    world = sc.init()
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)  # without DDP nobody else makes the ranks begin with the same parameters
    training, _ = load_text()
    model = TinyGPT()
    state = sc.SparseState(sc.TopK(density=0.01), model=model, collective="allgather")
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=2e-3)

    for step in range(options.steps):
        optimizer.zero_grad()
        loss = model(*random_batch(training, world.rank, step))
        loss.backward()
        sc.allreduce_gradients(model, state)
        optimizer.step()
        if world.rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: training loss {loss.item():.3f}", flush=True)

    if world.rank == 0:
        print(f"{state.metrics().ratio:.1f} times fewer bytes than dense")


if __name__ == "__main__":
    main()
