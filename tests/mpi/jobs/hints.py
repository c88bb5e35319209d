"""Trains with AdamW after error feedback, in fewer steps than the warm-up; says which rank warns, and where."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc


def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Writes a warning with the rank and the file."""
    print(f"rank {RANK} in {Path(filename).name}: {category.__name__}: {message}", file=sys.stderr, flush=True)


def main() -> None:
    model = DistributedDataParallel(torch.nn.Linear(40, 30))
    state = sc.SparseState(sc.TopK(sc.Geometric(0.25, 0.01, 20)), collective="allgather")
    model.register_comm_hook(state, sc.sparse_hook)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    RANK = sc.init().rank
    warnings.showwarning = show
    main()
