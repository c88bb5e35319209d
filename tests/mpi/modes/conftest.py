"""Keeps the heap small that a state searches for its DDP model: freezes the objects that each file leaves behind."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    gc.collect()
    gc.freeze()
