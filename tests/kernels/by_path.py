"""Calls on one kernel path from a test that runs on another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sparsecomm import kernels

T = TypeVar("T")


def by_reference(path: str, call: Callable[[], T]) -> T:
    """Runs a call on the reference, then switches back to the path under test."""
    kernels.set_path("reference")
    try:
        return call()
    finally:
        kernels.set_path(path)
