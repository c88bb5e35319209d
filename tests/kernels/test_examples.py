"""The worked examples in the docstrings are true on every path."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Iterator

import pytest
import torch

from sparsecomm import kernels


@pytest.fixture
def _float32() -> Iterator[None]:
    """Examples are for torch's own default dtype, whatever the suite runs with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize("module", ["select", "checksum", "codecs", "combine", "dense", "pairs", "sizes"])
def test_docstrings(path: str, module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"sparsecomm.kernels.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_every_kernel_has_an_example() -> None:
    plumbing = {
        "available_paths",
        "current_path",
        "native_problem",
        "release_scratch",
        "scratch_bytes",
        "set_path",
        "triton_problem",
    }
    for name in set(kernels.__all__) - plumbing:
        function = getattr(kernels, name)
        if callable(function):
            assert ">>>" in (function.__doc__ or ""), name
