"""The DDP modes in which memory is put aside, scaled or rebuilt, with chunks and shared indices: nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ledger import Ledger
from test_every_mode import MODES
from torch import nn

import sparsecomm as sc

COMPRESSORS = {
    "chunked": sc.ChunkTopK(0.2, chunk=4),
    "random": sc.RandomK(0.2),
    "cyclic": sc.CyclicTopK(0.2),
}
CHOSEN = [
    ("no_sync, views", "chunked"),
    ("channels-last", "chunked"),
    ("empty parameter", "chunked"),
    ("empty parameter", "cyclic"),
    ("unused, some ranks", "chunked"),
    ("unused, some ranks", "cyclic"),
    ("unused, rank 0 only", "random"),
    ("unused, all ranks, views", "random"),
    ("unused, all ranks, views", "chunked"),
    ("static_graph, never used", "cyclic"),
]


def of(name: str, **options: Any) -> sc.SparseState:
    return sc.SparseState(COMPRESSORS[name], collective="auto", value_codec="fp16", **options)


@pytest.mark.parametrize(("name", "kind"), CHOSEN)
def test_nothing_is_lost_and_replicas_agree(world: sc.World, name: str, kind: str) -> None:
    mode = MODES[name]
    ledger = Ledger(mode.make(), of(kind), **mode.ddp)
    for step in range(6):
        ledger.step(lambda step=step: mode.backward(ledger.ddp, step))
        with torch.no_grad():
            for p in ledger.model.parameters():
                if p.grad is not None:
                    p.sub_(0.05 * p.grad)
        ledger.check()
        ledger.check_replicas()
    assert ledger.kept_back > 0


@pytest.mark.parametrize("kind", ["chunked", "random", "cyclic"])
def test_a_scaler_that_skips_loses_nothing(world: sc.World, kind: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    ledger = Ledger(model, of(kind, scaler=scaler))
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
