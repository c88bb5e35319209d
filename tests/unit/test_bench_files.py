"""Result files: invalid ones are refused by name, two are compared row by row, a folder becomes one page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from typer.testing import CliRunner, Result

from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import BENCHES, registry, report, results
from sparsecomm.tools.cli.app import app
from sparsecomm.tools.cli.bench_files import COMMANDS

KEPT = sorted((ROOT / "bench" / "results").glob("*_2026-11-24_*.json"))
HOOK = next(path for path in KEPT if "hook" in path.name)
KERNELS = next(path for path in KEPT if "kernels" in path.name)


def call(*args: str | Path) -> Result:
    runner = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"})
    return runner.invoke(app, ["bench", *map(str, args)])


def changed(source: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads(source.read_text())
    change(data)
    to.write_text(json.dumps(data))
    return to


def on_another_machine(data: dict[str, Any]) -> None:
    data["meta"] |= {"cpu": "<b>another & better</b>", "cores": 96}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in KEPT:
        shutil.copy(path, tmp_path)
    return tmp_path


# --- loading ------------------------------------------------------------------------------------------------------

GOOD = {"meta": {"bench": "hook", "cpu": "x", "cores": 2}, "rows": [{"numel": 1}]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(GOOD)[:-5], "damaged, or no JSON"),
        ("", "damaged, or no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('["meta", "rows"]', 'not {"meta": {...}, "rows": [...]}'),
        ('{"packages": {"left-pad": 1}}', 'not {"meta": {...}, "rows": [...]}'),
        (json.dumps(GOOD | {"meta": {"cpu": "x", "cores": 2}}), "meta.bench = None"),
        (json.dumps(GOOD | {"meta": {"bench": "hook", "cpu": "x", "cores": True}}), "meta.cores = True"),
        (json.dumps(GOOD | {"meta": {"bench": "sort", "cpu": "x", "cores": 2}}), "bench 'sort', which is not here"),
        (json.dumps(GOOD | {"rows": []}), "no rows"),
        (json.dumps(GOOD | {"rows": [{}, 3]}), "rows[1] = 3"),
    ],
)
def test_what_is_no_result_is_refused_by_name(folder: Path, text: str, expected: str) -> None:
    (folder / "odd.json").write_text(text)
    for args in (
        ("report", folder),
        ("compare", HOOK, folder / "odd.json"),
        ("plot", folder / "odd.json", "--out", folder),
    ):
        done = call(*args)
        assert done.exit_code == 1
        assert "odd.json" in done.output
        assert expected in done.output
        assert "Traceback" not in done.output
    assert not (folder / "report.html").exists()


def test_rows_of_another_version_are_refused_by_name(folder: Path) -> None:
    changed(KERNELS, folder / "old.json", lambda data: [row.pop("numel") for row in data["rows"]])
    done = call("report", folder)
    assert done.exit_code == 1
    assert "old.json" in done.output
    assert "'numel'" in done.output


@pytest.mark.parametrize("what", ["empty", "missing"])
def test_a_folder_without_results_is_refused(tmp_path: Path, what: str) -> None:
    if what == "empty":
        (tmp_path / what).mkdir()
    done = call("report", tmp_path / what)
    assert done.exit_code == 1
    assert what in done.output


# --- comparing ----------------------------------------------------------------------------------------------------


def test_a_result_compared_with_itself_gives_one_everywhere() -> None:
    for path in KEPT:
        result = results.load(path)
        found = results.compare(result, result)
        assert len(found.rows) == len(result.rows)
        assert found.measures
        ratios = [row[f"{m} B/A"] for row in found.rows for m in found.measures if row[f"{m} A"]]
        assert ratios
        assert set(ratios) == {1.0}
        assert all(mean == pytest.approx(1.0) for mean in found.means.values())


def test_a_slower_run_shows_row_by_row(tmp_path: Path) -> None:
    def slow(data: dict[str, Any]) -> None:
        data["rows"].reverse()  # rows are matched by their keys and not by their order
        for row in data["rows"]:
            row["seconds"] *= 2.0 if row["path"] == "avx2" else 0.5

    slower = changed(KERNELS, tmp_path / "b.json", slow)
    found = results.compare(results.load(KERNELS), results.load(slower), ["seconds"])
    assert found.measures == ("seconds",)
    assert {(row["path"] == "avx2", row["seconds B/A"]) for row in found.rows} == {(True, 2.0), (False, 0.5)}
    paths = [row["path"] for row in found.rows]
    share = paths.count("avx2") / len(paths)
    assert found.means["seconds"] == pytest.approx(2.0 ** (2 * share - 1))


def test_rows_that_only_one_has_are_named(tmp_path: Path) -> None:
    shorter = changed(HOOK, tmp_path / "b.json", lambda data: data["rows"].pop(0))
    written = tmp_path / "rows.json"
    done = call("compare", HOOK, shorter, "--json", written)
    assert done.exit_code == 0, done.output
    assert "only in A: buckets = 1000, numel = 1024, world = 2" in done.output
    assert [row["numel"] for row in json.loads(written.read_text())["rows"]] == [2500000]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (on_another_machine, "96 cores"),
        (lambda data: data["meta"].update(cores=4), "4 cores"),
        (lambda data: data["meta"].update(bench="wire"), "nothing to compare"),
        (lambda data: [row.update(world=3) for row in data["rows"]], "no row in common"),
        (lambda data: data["rows"].append(data["rows"][0]), "two rows about"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    done = call("compare", HOOK, changed(HOOK, tmp_path / "b.json", change))
    assert done.exit_code == 1
    assert expected in done.output
    assert "b.json" in done.output


def test_a_field_that_is_not_there_is_refused() -> None:
    done = call("compare", HOOK, HOOK, "--field", "secnds")
    assert done.exit_code == 1
    assert "'secnds'" in done.output
    assert "overhead_seconds" in done.output


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_holds_every_row_and_every_verdict_and_needs_nothing_else(folder: Path) -> None:
    done = call("report", folder)
    assert done.exit_code == 0, done.output
    page = (folder / "report.html").read_text()
    loaded = results.load_folder(folder)
    assert page.count("<tr") - page.count("<thead>") == sum(len(r.rows) for r in loaded) + len(loaded)
    for word in ("ok", "MISS"):
        said = sum(r.verdicts()[word] for r in loaded)
        assert said > 0
        assert page.count(f'<span class="tag {word}">{word}</span>') == said
    for result in loaded:
        assert result.path.name in page
        assert f"sparsecomm bench {result.bench}" in page
    assert "<img" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|@import|url\(', page)
    assert "<script" not in page


def test_machines_are_not_mixed_unless_shown_apart(folder: Path) -> None:
    changed(HOOK, folder / "big.json", on_another_machine)
    done = call("report", folder)
    assert done.exit_code == 1
    assert "big.json" in done.output
    assert "--mixed" in done.output
    out = folder / "new" / "page.html"
    assert call("report", folder, "--mixed", "--out", out).exit_code == 0
    page = out.read_text()
    assert page.count("<h2>") == 2
    assert "&lt;b&gt;another &amp; better&lt;/b&gt;" in page
    assert "<b>another" not in page


def test_a_command_that_was_recorded_is_how_to_measure_again(tmp_path: Path) -> None:
    file = tmp_path / "wire.json"
    assert call("wire", "--numel", "4096", "--density", "0.01", "--repeats", "2", "--json", file).exit_code == 0
    page = report.page([results.load(file)])
    assert "sparsecomm bench wire --numel 4096 --densities 0.01 --repeats 2 --json wire.json" in page


# --- plots --------------------------------------------------------------------------------------------------------


def test_kernels_are_drawn_as_png_and_svg(tmp_path: Path) -> None:
    done = call("plot", KERNELS, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    png, svg = (tmp_path / "new" / f"kernels_roofline.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


def test_a_bench_that_draws_nothing_says_so_before_it_measures(tmp_path: Path) -> None:
    for args in (("plot", HOOK, "--out", tmp_path), ("hook", "--plot", tmp_path / "plots")):
        done = call(*args)
        assert done.exit_code == 1
        assert "bench hook has no plots" in done.output
    assert list(tmp_path.iterdir()) == []


def test_no_bench_hides_behind_a_command() -> None:
    assert not set(registry()) & set(COMMANDS)
    assert {"collectives", "hook", "kernels", "ratio", "wire"} <= set(BENCHES)


def test_verdicts_are_counted() -> None:
    rows = [{"ok": "ok"}, {"ok": "MISS"}, {"ok": ""}, {"error": "hangs", "ok": "MISS"}]
    result = results.Result(Path("x"), "hook", {"cpu": "x", "cores": 1}, rows)
    assert result.verdicts() == {"ok": 1, "MISS": 1, "error": 1}


def test_a_bench_that_declares_nothing_is_compared_by_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(results.ROWS, "hook")
    meta = {"cpu": "x", "cores": 1}
    a = results.Result(Path("a"), "hook", meta, [{"op": "x", "density": 0.1, "seconds": 1.0, "ok": "ok"}])
    b = results.Result(Path("b"), "hook", meta, [{"op": "x", "density": 0.1, "seconds": 3.0, "ok": "MISS"}])
    found = results.compare(a, b)
    assert (found.keys, found.means) == (("op", "density"), {"seconds": pytest.approx(3.0)})
    with pytest.raises(ConfigError, match="no row in common"):
        results.compare(a, results.Result(Path("c"), "hook", meta, [b.rows[0] | {"density": 0.2}]))
