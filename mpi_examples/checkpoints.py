"""Save a run, resume it, and resume it with another number of ranks.

    mpirun -n 2 python mpi_examples/checkpoints.py --steps 40     # trains 40 steps and saves
    mpirun -n 2 python mpi_examples/checkpoints.py --steps 80     # goes on from step 40
    mpirun -n 3 python mpi_examples/checkpoints.py --steps 120    # goes on from step 80 with three ranks

Rank 0 saves the model and the optimizer, which are the same on all ranks. Each rank saves ``state.state_dict()``, which
holds its residual: the part of its gradients that it has not sent yet.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: sc.SparseState) -> None:
    """Writes ``step-N`` and then lets ``latest`` name it, so that a killed run never leaves half a checkpoint behind.

    Collective. All ranks must see the folder.
    """
    target = folder / f"step-{step}"
    target.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        shared = {"step": step, "ranks": dist.get_world_size()}
        torch.save(shared | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, target / "shared.pt")
    torch.save(state.state_dict(), target / f"rank{dist.get_rank()}.pt")
    dist.barrier()  # every file is written
    if dist.get_rank() == 0:
        (folder / "latest.new").write_text(target.name)
        os.replace(folder / "latest.new", folder / "latest")
    dist.barrier()


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: sc.SparseState) -> int:
    """Loads the checkpoint that ``latest`` names. Returns its step, or 0 if there is none."""
    if not (folder / "latest").exists():
        return 0
    source = folder / (folder / "latest").read_text()
    shared = torch.load(source / "shared.pt", weights_only=True)
    model.load_state_dict(shared["model"])
    optimizer.load_state_dict(shared["optimizer"])
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == shared["ranks"]:
        state.load_state_dict(torch.load(source / f"rank{rank}.pt", weights_only=True))
    else:  # new ranks share the residuals of the old ones; nothing is lost
        files = [source / f"rank{old}.pt" for old in range(shared["ranks"])]
        saved = [torch.load(file, weights_only=True) for file in files]
        state.load_state_dict(sc.reshard(saved, size)[rank])
    return int(shared["step"])


def main() -> None:
    """Trains from the newest checkpoint to the last step, and saves there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="step to train to (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoints"), help="(default %(default)s)")
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

    def backward(step: int) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = ddp(*random_batch(training, world.rank, step))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    # DDP regroups its buckets after its first backward, and top-k selects within a bucket. One backward is thrown away
    # here so that a resumed run has the buckets of the run that it continues, and repeats it bit for bit.
    backward(0)
    first = resume(options.out, model, optimizer, state)
    if world.rank == 0:
        print(f"starts at step {first} with {world.size} ranks", flush=True)
    for step in range(first, options.steps):
        loss = backward(step)
        optimizer.step()
        if world.rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: training loss {loss.item():.6f}", flush=True)
    if first < options.steps:
        save(options.out, options.steps, model, optimizer, state)


if __name__ == "__main__":
    main()
