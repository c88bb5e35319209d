"""Keeps the heap that a state searches for its DDP model small: what one file leaves behind is frozen for the next."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    gc.collect()
    gc.freeze()
