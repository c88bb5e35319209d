"""Limits on functions and words, so that the code stays readable. docs/architecture.md and CONTRIBUTING.md say why."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "sparsecomm"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "_native" not in p.parts)
MOST_LINES = 60
MOST_PARAMETERS = 6
MANY_PARAMETERS = {
    "optim/adamw.py:__init__": "its parameters are those of torch's optimizer",
    "optim/sgd.py:__init__": "its parameters are those of torch's optimizer",
    "ps/job.py:run": "its parameters are the user's options, all keyword-only",
}
"""Functions with more parameters, each with the reason; at most four."""
FEW_WHATS = 150
FEW_SEES = 5


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """All functions of a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_triton(function: ast.FunctionDef) -> bool:
    """Whether it is a kernel, whose arguments are pointers and constants of a launch."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of all parameters but self and cls."""
    a = function.args
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [p.arg for p in found if p.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_fit_a_screen(path: Path) -> None:
    long = [f.name for f in functions(path) if (f.end_lineno or 0) - f.lineno + 1 > MOST_LINES and not is_triton(f)]
    assert not long, f"over {MOST_LINES} lines: {long}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_take_few_parameters(path: Path) -> None:
    where = path.relative_to(PACKAGE)
    if where.parts[0] == "tools" or "triton" in where.parts:
        return  # a bench's parameters are its command's options
    many = [f.name for f in functions(path) if len(parameters(f)) > MOST_PARAMETERS]
    many = [name for name in many if f"{where}:{name}" not in MANY_PARAMETERS]
    assert not many, f"over {MOST_PARAMETERS} parameters: {many}"


def test_exceptions_are_few() -> None:
    assert len(MANY_PARAMETERS) <= 4


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_type_has_one_boolean_field_at_most(path: Path) -> None:
    """Two booleans are four modes; a class a mode says which there are. Facts in reports are no modes."""
    where = str(path.relative_to(PACKAGE))
    if where.startswith("tools/") or where in FACTS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            fields = [s for s in node.body if isinstance(s, ast.AnnAssign) and ast.unparse(s.annotation) == "bool"]
            assert len(fields) <= 1, f"{node.name}: {[ast.unparse(f.target) for f in fields]}"


FACTS = {
    "exchange/agree.py": "what all ranks have found out",
    "feedback/options.py": "options of momentum correction that users set one by one",
    "transport/base.py": "two properties of a transport",
}
"""Files whose types have several boolean fields that are facts or options, with what these are."""


def docstrings() -> Iterator[tuple[Path, str]]:
    """All docstrings of the package."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield path, ast.get_docstring(node) or ""


def test_docstrings_say_something_themselves() -> None:
    found = [f"{path.relative_to(PACKAGE)}: {text[:60]}" for path, text in docstrings() if text.startswith("See")]
    assert len(found) < FEW_SEES, "\n".join(found)


def test_sentences_have_subjects() -> None:
    """Few sentences begin with, or turn around, a what-clause."""
    uses = sum(len(re.findall(r"\bwhat\b", path.read_text(), re.IGNORECASE)) for path in MODULES)
    assert uses < FEW_WHATS
