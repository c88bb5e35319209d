"""No tensor or layer of the package, nor of its tests, has the dtype that a script made torch's default."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Set
from pathlib import Path

import pytest
from helpers import ROOT
from torch import nn

MAKERS = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}
TENSORS = {f"torch.{maker}" for maker in MAKERS}
TYPES = {name: value for name, value in vars(nn).items() if inspect.isclass(value)}
MADE = [name for name, value in TYPES.items() if "dtype" in inspect.signature(value).parameters]
LAYERS = {f"{package}nn.{name}" for name in MADE for package in ("", "torch.")}
SCRIPTS = set((ROOT / "tests").glob("*/jobs/*.py"))
"""What tests start as a user's script, which need not say it."""
FILES = sorted({p for top in ("sparsecomm", "tests") for p in (ROOT / top).rglob("*.py")} - SCRIPTS)


def undecided(source: str, makers: Set[str] = TENSORS) -> list[str]:
    """Returns the calls of `makers` that do not say a dtype, each with its line."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if ast.unparse(call.func) in makers and not any(keyword.arg in ("dtype", None) for keyword in call.keywords)
    ]


def test_undecided_dtypes_are_found() -> None:
    assert undecided("import torch\nx = torch.zeros(3)") == ["2: torch.zeros(3)"]
    assert not undecided("x = torch.zeros(3, dtype=torch.int64) + torch.zeros_like(y) + y.new_zeros(3)")
    assert undecided("x = nn.Tanh()(nn.Linear(3, 2)(y))", LAYERS) == ["1: nn.Linear(3, 2)"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_new_tensor_and_layer_says_its_dtype(path: Path) -> None:
    assert undecided(path.read_text(), TENSORS | LAYERS) == []
