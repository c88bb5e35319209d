"""The DDP modes in which memory is put aside, scaled or rebuilt, with split-reduce: nothing is lost."""

from __future__ import annotations

import pytest
import torch
from ledger import Ledger, sparse
from test_every_mode import MODES
from torch import nn

import sparsecomm as sc

CHOSEN = [
    ("no_sync, views", "split_reduce"),
    ("channels-last", "split_reduce"),
    ("empty parameter", "split_reduce"),
    ("unused, some ranks", "split_reduce"),
    ("unused, some ranks", "ssar"),
    ("unused, rank 0 only", "split_reduce"),
    ("unused, all ranks, views", "split_reduce"),
    ("static_graph, never used", "ssar"),
]


@pytest.mark.parametrize(("name", "collective"), CHOSEN)
def test_nothing_is_lost_and_replicas_agree(world: sc.World, name: str, collective: str) -> None:
    mode = MODES[name]
    ledger = Ledger(mode.make(), sparse(collective=collective), **mode.ddp)
    for step in range(6):
        ledger.step(lambda step=step: mode.backward(ledger.ddp, step))
        with torch.no_grad():
            for p in ledger.model.parameters():
                if p.grad is not None:
                    p.sub_(0.05 * p.grad)
        ledger.check()
        ledger.check_replicas()
    assert ledger.kept_back > 0


@pytest.mark.parametrize("collective", ["split_reduce", "ssar"])
def test_a_scaler_that_skips_loses_nothing(world: sc.World, collective: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    ledger = Ledger(model, sparse(collective=collective, scaler=scaler))
    ledger.scale = lambda: float(scaler.get_scale())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    skipped = 0
    for step in range(8):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + world.rank))
        if step in (2, 5) and world.rank == world.size - 1:
            x[0, 0] = float("inf")

        def backward(x: torch.Tensor = x) -> None:
            scaler.scale(ledger.ddp(x).square().mean()).backward()

        skipped += not ledger.step(backward)
        scaler.step(optimizer)
        scaler.update()
        ledger.check()
        ledger.check_replicas()
    assert skipped == 2
