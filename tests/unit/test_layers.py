"""The order of the layers, circles of imports, the users of MPI, and the modules loaded by an import."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT, job_environment

PACKAGE = ROOT / "sparsecomm"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "_native" not in p.parts)

# From the bottom up. A layer may import itself and the layers before it.
ORDER = [
    "errors",
    "types",
    "runtime",
    "_core",
    "kernels",
    "compress",
    "feedback",
    "wire",
    "transport",
    "collectives",
    "exchange",
    "presets",
    "launch",
    "backend",
    "ddp",
    "optim",
    "ps",
    "testing",
    "tools",
]
NOT_YET = {"presets": {"launch"}, "ddp": {"backend"}, "optim": {"backend"}, "ps": {"ddp", "backend"}}
"""Neighbours that have no business with each other."""
EXCHANGE_ORDER = [
    {"costs", "plan", "agree", "messages", "alignment", "inferred"},
    {"method"},
    {"pipeline"},
    {"methods"},
    {"config"},
    {"auto"},
]
"""From the bottom up inside exchange/. A module or folder may import its own group and the groups before it."""
FACADES = {"__init__", "__main__"}
MOST_LINES = 400


def layer_of(path: Path) -> str:
    """The package or module directly below sparsecomm that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything a file imports, in functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_layer_imports_only_from_below(path: Path) -> None:
    mine = layer_of(path)
    if mine in FACADES:
        return
    assert mine in ORDER, f"{mine} has no place in the order of layers"
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] != "sparsecomm" or len(parts) == 1:
            continue
        theirs = parts[1]
        if theirs == "__version__":
            continue
        assert theirs in ORDER, f"{path}:{line} imports {name}, which has no place in the order of layers"
        assert ORDER.index(theirs) <= ORDER.index(mine), f"{path}:{line}: {mine} imports {theirs}, which is above it"
        assert theirs not in NOT_YET.get(mine, set()), f"{path}:{line}: {mine} has no business with {theirs}"


def module_name(path: Path) -> str:
    """The full name of the module or package in a file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def module_graph() -> dict[str, set[str]]:
    """Every module's imports from the package; a name that is not a module stands for the module that has it."""
    names = {module_name(path) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph[module_name(path)] = found = set()
        for _, name in imported(path):
            known = name if name in names else name.rpartition(".")[0]
            if known in names and known != module_name(path):
                found.add(known)
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest groups of modules in which every one imports every other, directly or through others."""
    reached = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:  # Warshall: paths through the modules up to `middle`
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    mutual = (frozenset({a, *(b for b in reached[a] if a in reached[b])}) for a in graph)
    return {group for group in mutual if len(group) > 1}


@pytest.mark.parametrize("room", [layer for layer in ORDER if (PACKAGE / layer).is_dir()])
def test_no_modules_of_a_room_import_each_other(room: str) -> None:
    """Imports in functions and under TYPE_CHECKING count: they are a circle all the same."""
    prefix = f"sparsecomm.{room}"
    graph = {name: targets for name, targets in module_graph().items() if f"{name}.".startswith(f"{prefix}.")}
    inside = {name: {t for t in targets if t in graph} for name, targets in graph.items()}
    found = circles(inside)
    assert not found, f"{sorted(map(sorted, found))} import each other"


def test_circles_are_found() -> None:
    chain = {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}
    assert circles(chain) == set()
    assert circles(chain | {"c": {"b"}}) == {frozenset("bc")}
    assert circles(chain | {"c": {"a"}}) == {frozenset("abc")}


def test_the_order_inside_exchange() -> None:
    floors = {name: floor for floor, names in enumerate(EXCHANGE_ORDER) for name in names}
    for path in MODULES:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "exchange" or parts[1] == "__init__":
            continue
        for line, name in imported(path):
            if not name.startswith("sparsecomm.exchange."):
                continue
            theirs = name.split(".")[2]
            assert theirs in floors, f"{path}:{line} imports {name}: import it from the module that defines it"
            assert floors[theirs] <= floors[parts[1]], f"{path}:{line}: {parts[1]} imports {theirs}, which is above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_mpi_transport_and_the_command_line_import_mpi4py(path: Path) -> None:
    allowed = path == PACKAGE / "transport" / "mpi.py" or path.is_relative_to(PACKAGE / "tools" / "cli")
    users = [line for line, name in imported(path) if name.split(".")[0] == "mpi4py"]
    assert allowed or not users, f"{path}:{users}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MOST_LINES, f"{path} has {lines} lines"


def test_importing_the_package_loads_neither_mpi_nor_triton() -> None:
    code = "import sys, sparsecomm; print([m for m in sys.modules if m.split('.')[0] in ('mpi4py', 'triton')])"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=job_environment(), check=True, timeout=120)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_the_facade_exports_what_it_says() -> None:
    import sparsecomm

    assert sorted(sparsecomm.__all__) == list(sparsecomm.__all__), "in order"
    assert all(hasattr(sparsecomm, name) for name in sparsecomm.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_and_what_it_exports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    defines = any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") for n in tree.body)
    assert "__all__" in names or not defines, f"{path} has no __all__"
