"""Train a sharded model (FSDP2) in two replicas, which exchange 1% of their gradients.

    mpirun -n 4 python mpi_examples/sharded_replicas.py --steps 60

Each replica is two ranks, between which torch shards the model and sums gradients densely, as between the GPUs of one
host. The ranks that hold the same shard are in different replicas, as on different hosts; between them goes the state.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsecomm as sc


def main() -> None:
    """Trains, and prints the loss and the bytes saved between the replicas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates (default %(default)s)")
    options = parser.parse_args()

    dist.init_process_group("sparsecomm")
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)  # all replicas begin with the same parameters
    training, _ = load_text()
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replica", "shard"))
    model = TinyGPT()
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])

    replicas = mesh["replica"].get_group()
    state = sc.SparseState(sc.TopK(density=0.01), model=model, process_group=replicas, collective="allgather")
    sc.average_replicas(model, state)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=2e-3)

    for step in range(options.steps):
        optimizer.zero_grad()
        loss = model(*random_batch(training, dist.get_rank(), step))
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: training loss {loss.item():.3f}", flush=True)

    if dist.get_rank() == 0:
        print(f"{state.metrics().ratio:.1f} times fewer bytes between the replicas than dense")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
