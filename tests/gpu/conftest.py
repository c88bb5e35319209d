"""All tests here need a GPU that Triton compiles for; without one they are skipped, with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sparsecomm import kernels

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kernels"))  # cases that tests/kernels runs in the interpreter


def missing() -> str | None:
    """Returns the reason why these tests cannot run, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return kernels.triton_problem()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    problem = missing()
    for item in items:
        if problem is not None and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))
