"""A tiny training run with the hook. The arguments say which failure happens in it, and where.

train.py [--steps N] [--collective NAME] [--fail KIND] [--rank R] [--at STEP] [--pause SECONDS]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc


def go_wrong(kind: str, world: sc.World) -> None:
    """Fails in the way that was asked for."""
    if kind == "raise":
        raise ValueError("the dog ate the batch")
    if kind == "exit":
        sys.exit(3)
    if kind == "sleep":
        time.sleep(600)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--collective", default="allgather")
    parser.add_argument("--fail", default="")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--at", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    early = sc.SparseState(sc.TopK(0.1)) if args.fail == "forget_early" else None
    world = sc.init()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)), bucket_cap_mb=0.001)
    state = sc.SparseState(sc.TopK(0.1), collective=args.collective) if early is None else early
    if not args.fail.startswith("forget"):
        model.register_comm_hook(state, sc.sparse_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(world.rank)
    for step in range(args.steps):
        if args.fail and world.rank == args.rank and step == args.at:
            if args.fail == "return":
                return
            go_wrong(args.fail, world)
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        time.sleep(args.pause)
    digest = sum(p.double().sum().item() for p in model.parameters())
    line = f"rank {world.rank} of {world.size} over {world.transport}: {state.metrics().steps} steps, {digest:.12f}\n"
    sys.stdout.write(line)  # in one piece, since all ranks may share one file


if __name__ == "__main__":
    main()
