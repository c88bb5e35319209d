"""Averages given gradients by DDP and the hook on a device; writes the averages and state of each rank to a folder.

averages.py DEVICE COLLECTIVE COMPRESSOR DTYPE FOLDER [STEPS LONGEST]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

COMPRESSORS = {"topk": sc.TopK(0.05), "threshold": sc.ThresholdTopK(0.05, interval=3)}


class Sum(nn.Module):
    """Three vectors in a weighted sum; their gradients are the weights, exactly, on every device."""

    def __init__(self, dtype: torch.dtype, longest: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(n, dtype=dtype) for n in (longest, 300, 5000))

    def forward(self, weights: list[torch.Tensor]) -> torch.Tensor:
        return sum(
            ((p * w).sum() for p, w in zip(self.parts, weights, strict=True)),
            torch.zeros((), dtype=torch.float32).to(weights[0]),
        )


def main() -> None:
    device, collective, compressor, kind, folder, *less = sys.argv[1:]
    dtype, (steps, longest) = getattr(torch, kind), map(int, less or (6, 70_001))
    world = sc.init()
    # NCCL needs one GPU for each rank; Gloo sends the messages with which DDP starts.
    group = dist.new_group(backend="gloo")
    ddp = DistributedDataParallel(Sum(dtype, longest).to(device), process_group=group, bucket_cap_mb=0.1)
    state = sc.SparseState(COMPRESSORS[compressor], collective=collective, value_codec="fp16")
    ddp.register_comm_hook(state, sc.sparse_hook)
    averages = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + world.rank)
        weights = [
            torch.randn(p.shape, generator=generator, dtype=torch.float32).to(dtype).to(device)
            for p in ddp.module.parts
        ]
        ddp.zero_grad()
        ddp(weights).backward()
        averages.append([p.grad.cpu() for p in ddp.module.parts])
    saved = {name: tensor.cpu() for name, tensor in state.state_dict().items()}
    torch.save({"averages": averages, "state": saved}, Path(folder) / f"{device}-{world.rank}.pt")


if __name__ == "__main__":
    main()
