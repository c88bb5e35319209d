"""Tests that switch kernels must switch back: the rest of the suite is to test what users run."""

from __future__ import annotations

import os

from sparsecomm import kernels


def test_the_default_kernels_are_in_use() -> None:
    assert kernels.current_path() == (os.environ.get("SPARSECOMM_KERNELS") or kernels.available_paths()[0])
