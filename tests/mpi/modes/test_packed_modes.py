"""The DDP modes in which memory is put aside, scaled or rebuilt, with chunks and shared indices: nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
from ledger import Ledger, assert_skips_lose_nothing
from test_every_mode import MODES

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
        ledger.descend()
        ledger.check()
        ledger.check_replicas()
    assert ledger.kept_back > 0


@pytest.mark.parametrize("kind", ["chunked", "random", "cyclic"])
def test_a_scaler_that_skips_loses_nothing(world: sc.World, kind: str) -> None:
    assert_skips_lose_nothing(
        lambda model, scaler: Ledger(model, of(kind, scaler=scaler)), steps=8, bad=(2, 5), every_step=True
    )
