"""train_on.py FILE: trains for ever with the hook; rank 0 makes FILE once some steps are done."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

torch.set_num_threads(1)
world = sc.init()
model = DistributedDataParallel(torch.nn.Linear(64, 32, dtype=torch.float32))
state = sc.SparseState(sc.TopK(0.1), collective="allgather")
model.register_comm_hook(state, sc.sparse_hook)
while True:
    model(torch.randn(4, 64, dtype=torch.float32)).square().mean().backward()
    if world.rank == 0 and state.step == 5:
        Path(sys.argv[1]).touch()
