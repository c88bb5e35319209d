"""The command line starts quickly, reports mistakes clearly, and `bench` lists all registered benches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import sparsecomm.tools
from sparsecomm.errors import ConfigError
from sparsecomm.tools.cli.app import app
from sparsecomm.tools.cli.bench import options_of
from sparsecomm.tools.cli.output import write_json

ROOT = Path(__file__).resolve().parents[2]
seen: dict[str, Any] = {}


def sample(
    numel: int = 1000,
    densities: Sequence[float] = (0.001, 0.01),
    paths: tuple[str, ...] | None = None,
    repeats: int | None = None,
    quick: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measures nothing, twice.

    Args:
        numel: elements of the
            vector.
        densities: fractions of it.
        paths: kernel paths.

    Returns:
        A result.
    """
    seen.update(numel=numel, densities=densities, paths=paths, repeats=repeats, quick=quick, progress=progress)
    if numel < 0:
        raise ConfigError(f"numel = {numel} is negative")
    return {"meta": {"cpu": "made up"}, "rows": [{"op": "nothing", "seconds": 0.12345678}, {"op": "more", "extra": 3}]}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[..., Mapping[str, Any]]]]:
    """A registry with one bench in place of the real one."""
    module = types.ModuleType("sparsecomm.tools.benches")
    module.BENCHES = {"sample": sample}  # type: ignore[attr-defined]
    module.registry = lambda: module.BENCHES  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparsecomm.tools.benches", module)
    monkeypatch.setattr(sparsecomm.tools, "benches", module, raising=False)
    seen.clear()
    return module.BENCHES


def call(*args: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, args)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_mpi(option: str) -> None:
    code = (
        "import sys, sparsecomm.tools.cli\n"
        "try: sparsecomm.tools.cli.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'mpi4py' not in sys.modules\n"
        "assert not any(m.startswith('sparsecomm.tools.cli.doctor') for m in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, option],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout or f"sparsecomm {sparsecomm.__version__}" in done.stdout


def test_bench_lists_what_the_registry_holds() -> None:
    for args in ((), ("--list",), ("--help",)):
        done = call("bench", *args)
        assert done.exit_code == 0
        assert "sample" in done.output
        assert "Measures nothing, twice." in done.output
        assert {"plot", "report", "compare"} <= set(done.output.split())


def test_an_unknown_bench_is_an_error_that_names_the_known() -> None:
    done = call("bench", "smaple")
    assert done.exit_code == 2
    assert "'smaple'" in done.output
    assert "known: sample" in done.output


def test_options_come_from_the_signature_and_the_docstring() -> None:
    done = call("bench", "sample", "--help")
    assert done.exit_code == 0
    for expected in (
        "--numel",
        "elements of the vector.",
        "--density",
        "--densities",
        "0.001,0.01",
        "--path",
        "--json",
    ):
        assert expected in done.output
    assert "progress" not in done.output  # a callback is not an option
    assert set(options_of(sample)) == {"numel", "densities", "paths", "repeats", "quick"}


def test_given_options_reach_the_bench_and_others_keep_its_defaults() -> None:
    assert call("bench", "sample", "--numel", "7", "--density", "0.5,0.25", "--density", "1", "--quick").exit_code == 0
    expected = {"numel": 7, "densities": (0.5, 0.25, 1.0), "paths": None, "repeats": None, "quick": True}
    assert seen == {**expected, "progress": None}


def test_rows_are_shown_and_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    done = call("bench", "sample", "--json", str(file))
    assert done.exit_code == 0
    for expected in ("nothing", "0.1235", "extra", str(file)):
        assert expected in done.output
    written = json.loads(file.read_text())
    assert written["rows"] == sample()["rows"]
    assert written["meta"] == {
        "bench": "sample",
        "command": "sparsecomm bench sample --numel 1000 --no-quick",
        "cpu": "made up",
    }
    assert [p.name for p in file.parent.iterdir()] == ["rows.json"]


def test_a_bench_may_show_its_rows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def print_table(result: Mapping[str, Any], console: Console) -> None:
        console.print(f"my own table of {len(result['rows'])} rows")

    monkeypatch.setattr(sys.modules[__name__], "print_table", print_table, raising=False)
    assert "my own table of 2 rows" in call("bench", "sample").output


def test_the_real_benches_are_found_and_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # the sample registry
    file = tmp_path / "wire.json"
    done = call("bench", "wire", "--numel", "4096", "--density", "0.01", "--repeats", "2", "--json", str(file))
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert "torch" in result["meta"]
    assert result["meta"]["command"] == "sparsecomm bench wire --numel 4096 --densities 0.01 --repeats 2"
    assert {row["density"] for row in result["rows"]} == {0.01}
    assert {"kernels", "wire"} <= set(call("bench").output.split())


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (("--numel", "-1"), 1, "numel = -1 is negative"),
        (("--numel", "many"), 2, "--numel"),
        (("--density", "0.1,x"), 2, "'0.1,x' is not a list of floats"),
        (("--nonsense",), 2, "--nonsense"),
        (("--json", "/proc/nowhere/rows.json"), 1, "/proc/nowhere"),
    ],
)
def test_mistakes_are_one_clear_error(args: tuple[str, ...], code: int, expected: str) -> None:
    done = call("bench", "sample", *args)
    assert done.exit_code == code
    assert expected in done.output
    assert "Traceback" not in done.output


def test_other_ranks_are_silent_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    done = call("bench", "sample", "--json", str(tmp_path / "rows.json"))
    assert (done.exit_code, done.output) == (0, "")
    assert seen["numel"] == 1000
    assert not (tmp_path / "rows.json").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    write_json(file, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(file, {"rows": [object()]})
    assert json.loads(file.read_text()) == {"rows": [1]}
    assert len(list(tmp_path.iterdir())) == 1
