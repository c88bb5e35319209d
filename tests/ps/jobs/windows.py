"""Workers read shards from windows while the server updates them; all values of a shard must be of one update.

Run under mpirun without ULFM. Gradients are alike in all elements, so a shard's values are equal after each update.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from small import PlainSGD

import sparsecomm as sc

NUMEL = 2_000_000


class Flat(torch.nn.Module):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(numel, dtype=torch.float32))


def torn_or_not(rank: int, size: int) -> tuple[sc.ps.WorkerMetrics, str]:
    """One worker pushes, the others only pull, as fast as they can."""
    model = Flat(NUMEL)
    worker = sc.ps.Worker(model, sc.Dense())
    model.weight.grad = torch.full((NUMEL,), -float(size), dtype=torch.float32)
    last = -1.0
    for _ in range(40):
        if rank == 0:
            worker.push()
        worker.pull()
        values = model.weight.detach()
        low, high = torch.aminmax(values)
        assert low == high, f"torn: values from {low} to {high} at version {worker.versions}"
        assert float(low) == worker.versions[0], f"{low} at version {worker.versions}"
        assert float(low) >= last, "an older version than before"
        last = float(low)
    return worker.metrics(), worker.explain()


def synchronous(rank: int, size: int) -> torch.Tensor:
    """Makes some steps on random gradients and returns the parameters."""
    model = Flat(1000)
    worker = sc.ps.Worker(model, sc.TopK(0.1))
    for step in range(10):
        g = torch.Generator().manual_seed(100 * rank + step)
        model.weight.grad = torch.randn(1000, generator=g, dtype=torch.float32)
        worker.step()
    return model.weight.detach().clone()


def main() -> int:
    import mpi4py

    mpi4py.rc.initialize = False
    torch.set_num_threads(1)
    common: dict[str, Any] = {"optimizer": PlainSGD, "timeout": 60.0}
    out = sc.ps.run(torn_or_not, mode=sc.ps.Asynchronous(), pull_by="one_sided", **common)
    if out.role == "worker":
        metrics, said = out.result
        print(f"worker {out.rank}: {metrics.pulls} pulls, {metrics.torn} torn, {metrics.fallbacks} asked; {said}")
    results = [
        sc.ps.run(synchronous, servers=2, pull_by=way, **common).result for way in ("asked", "one_sided", "auto")
    ]
    if out.rank == 0:
        print(f"synchronous, the same bits: {[torch.equal(results[0], r) for r in results[1:]]}")
    choice = sc.ps.run(lambda *_: sc.ps.Worker(Flat(NUMEL)).explain(), pull=sc.TopK(0.01), pull_by="auto", **common)
    if out.rank == 0:
        print(choice.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
