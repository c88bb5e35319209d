"""No tensor of the package has the dtype that a script made torch's default."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparsecomm as sc

MAKERS = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}
FILES = sorted(Path(sc.__file__).parent.rglob("*.py"))


def undecided(source: str) -> list[str]:
    """Returns the calls that make a tensor without saying its dtype, each with its line."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if ast.unparse(call.func) in {f"torch.{maker}" for maker in MAKERS}
        and not any(keyword.arg in ("dtype", None) for keyword in call.keywords)
    ]


def test_undecided_dtypes_are_found() -> None:
    assert undecided("import torch\nx = torch.zeros(3)") == ["2: torch.zeros(3)"]
    assert not undecided("x = torch.zeros(3, dtype=torch.int64) + torch.zeros_like(y) + y.new_zeros(3)")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_new_tensor_says_its_dtype(path: Path) -> None:
    assert undecided(path.read_text()) == []
