"""Train with autocast in fp16 and a GradScaler.

    mpirun -n 2 python mpi_examples/half_precision.py --steps 40

``SparseState(scaler=scaler)`` keeps residuals in unscaled units, so that they survive a change of the scale. When the
gradient overflows on one rank, all ranks skip that step and every residual returns to its value before the step.
"""

from __future__ import annotations

import argparse

import torch
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc


def main() -> None:
    """Trains, and prints the loss and the scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="updates (default %(default)s)")
    options = parser.parse_args()

    world = sc.init()
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)
    training, _ = load_text()
    model = TinyGPT()
    # The first scale is far too large for fp16, so that the first steps overflow and are skipped.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    ddp = DistributedDataParallel(model)
    state = sc.SparseState(sc.TopK(density=0.01), scaler=scaler, collective="allgather")
    ddp.register_comm_hook(state, sc.sparse_hook)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=2e-3)

    for step in range(options.steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = ddp(*random_batch(training, world.rank, step))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if world.rank == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1}: training loss {loss.item():.3f}, scale {scaler.get_scale():,.0f}", flush=True)


if __name__ == "__main__":
    main()
