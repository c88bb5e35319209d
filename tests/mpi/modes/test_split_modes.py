"""The DDP modes in which memory is put aside, scaled or rebuilt, with split-reduce: nothing is lost."""

from __future__ import annotations

import pytest
from ledger import Ledger, assert_skips_lose_nothing, sparse
from test_every_mode import MODES

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
        ledger.descend()
        ledger.check()
        ledger.check_replicas()
    assert ledger.kept_back > 0


@pytest.mark.parametrize("collective", ["split_reduce", "ssar"])
def test_a_scaler_that_skips_loses_nothing(world: sc.World, collective: str) -> None:
    assert_skips_lose_nothing(
        lambda model, scaler: Ledger(model, sparse(collective=collective, scaler=scaler)),
        steps=8,
        bad=(2, 5),
        every_step=True,
    )
