"""Training does not grow: threads, open files and memory stay as they are after the first steps."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

STEPS = 3000 if os.environ.get("SPARSECOMM_TEST_FAULTS") == "all" else 300
WARM = 100
MOST_GROWTH = 4 << 20  # bytes; a leak of one bucket a step would be 80 times this in the long form


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counts() -> tuple[int, int]:
    """Number of threads, Python's and others, and of open files."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("collective", ["allgather", "split_reduce", "auto"])
def test_threads_files_and_memory_stay_flat(world: sc.World, collective: str) -> None:
    if world.size != 2:
        pytest.skip("two ranks suffice")
    torch.manual_seed(0)
    layers = [nn.Linear(160, 160, dtype=torch.float32) for _ in range(4)]
    ddp = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.1)
    state = sc.SparseState(sc.TopK(0.05), collective=collective)
    ddp.register_comm_hook(state, sc.sparse_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    x = torch.randn(4, 160, dtype=torch.float32)
    python_threads, before, memory = 0, (0, 0), 0
    for step in range(STEPS):
        if step == WARM:
            python_threads, before, memory = threading.active_count(), counts(), resident()
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    assert threading.active_count() == python_threads
    threads, files = counts()
    assert threads <= before[0] + 1, "torch may start a thread of its own late"
    assert files <= before[1]
    assert resident() - memory < MOST_GROWTH
