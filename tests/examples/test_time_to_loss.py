"""`bench time-to-loss`: which runs it makes, its figures from logs made up to be known, and a short form of it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import launching
import pytest
import study_gpt
import time_to_loss
import time_to_loss_cells
import transfer_cells
from compression import make_state
from convergence_runs import finished
from convergence_study import Run, StudyError, load_study
from helpers import mpirun_command
from rich.console import Console
from run_log import Row, RunLog
from time_to_loss import Plan, Way, do_runs, highest_first, in_lab, make_rows, make_runs, make_ways

import sparsecomm as sc
from sparsecomm.tools.benches import time_to_loss as command
from sparsecomm.tools.cli.bench import run as bench
from sparsecomm.tools.lab import Lab, LabError, missing

LIMIT, DENSE, FP16, OURS = Way("limit"), Way("dense"), Way("fp16"), Way("sparsecomm", 0.01)
LOSSES = [6.0, 4.0, 3.0, 2.5, 2.0, 1.5]  # at steps 0, 2, ... 10; the mean of the last three is 2.0
TARGET = 2.0


def plan(out: Path, **changes: Any) -> Plan:
    options: dict[str, Any] = {
        "tasks": ("code",),
        "rates": highest_first(("100mbit", "1gbit")),
        "ways": make_ways(("fp16", "sparsecomm"), (0.01,)),
        "hosts": 2,
        "seeds": (0, 1),
        "steps": 10,
        "out": out,
        "margins": (0.0,),
        "place": {"cpu": "a", "hosts": 2},
    }
    return Plan(**options | changes)


def put(run: Run, losses: list[float], step_seconds: float, step_bytes: int) -> None:
    """A finished run of ten steps, evaluated at every second one."""
    rows = [
        Row(
            step=i,
            train_loss=None,
            val_loss=losses[i // 2] if i % 2 == 0 else None,
            seconds=step_seconds * i,
            bytes_sent=step_bytes * i,
            ratio=None,
        )
        for i in range(11)
    ]
    RunLog({"bytes_are": "counted", "parameters": 1000}, rows).write(run.log)


def put_all(made: dict[time_to_loss.Key, Run]) -> None:
    """Dense and fp16 take 1 s a step at 1gbit and 10 s at 100mbit, ours half a second, the limit a quarter."""
    for (_, rate, way, seed), run in made.items():
        slow = 10.0 if rate == "100mbit" else 1.0
        if way == OURS:  # the second seed does not reach the target, the first reaches it at its eighth step
            put(run, [6.0, 4.0, 2.0, 2.0, 2.0, 2.0] if seed == 0 else [9.0] * 6, 0.5, 10)
        else:
            put(run, LOSSES, 0.25 if way == LIMIT else slow, 0 if way == LIMIT else 4000)


def rows_by_name(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["rate"], row["method"]): row for row in rows}


def test_losses_that_do_not_depend_on_the_rate_are_trained_once(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.rates == ("1gbit", "100mbit"), "the highest rate is first"
    runs = {key[1:] for key in make_runs(made)}
    both = {(rate, OURS, seed) for rate in ("1gbit", "100mbit") for seed in (0, 1)}
    once = {(rate, way, seed) for rate, seed in (("1gbit", 0), ("1gbit", 1), ("100mbit", 0)) for way in (DENSE, FP16)}
    assert runs == both | once | {("none", LIMIT, 0)}


def test_runs_in_another_place_are_other_runs(tmp_path: Path) -> None:
    here = plan(tmp_path)
    folders = {run.folder for run in make_runs(here).values()}
    assert len(folders) == 7, "three methods at two rates, and the limit"
    for other in ({"place": {"cpu": "b", "hosts": 2}}, {"hosts": 4}, {"steps": 20}):
        assert not folders & {run.folder for run in make_runs(plan(tmp_path, **other)).values()}
    again = plan(tmp_path, rates=("10gbit", "1gbit"))
    assert len(folders & {run.folder for run in make_runs(again).values()}) == 4, "those at 1gbit, and the limit"


def test_figures_come_from_the_losses_and_the_clock_that_belong_to_them(tmp_path: Path) -> None:
    made = plan(tmp_path)
    runs = make_runs(made)
    put_all(runs)
    rows = rows_by_name(make_rows(made, runs, {}))
    assert {row["error"] for row in rows.values()} == {None}
    for rate, seconds in (("1gbit", 10.0), ("100mbit", 100.0)):
        dense, limit, ours = (rows[rate, name] for name in ("dense", "limit", "sparsecomm"))
        assert dense["target"] == pytest.approx(TARGET)
        assert (dense["seconds"], dense["steps"], dense["bytes"], dense["reached"]) == (seconds, 10, 40_000, 2)
        assert (limit["seconds"], limit["steps"], limit["bytes"]) == (2.5, 10, 0), "dense's losses, its own seconds"
        assert limit["end_loss"] == pytest.approx(dense["end_loss"])
        assert (ours["seconds_low"], ours["steps_low"], ours["bytes_low"]) == (4.0, 8, 80)
        assert (ours["seconds"], ours["seconds_high"], ours["reached"]) == (None, None, 1), "one of two is no median"
        assert dense["step_seconds"] == pytest.approx(seconds / 10)
        assert ours["curve"][1] == [2, 1.0, 20, pytest.approx((4.0 + 9.0) / 2)]
        assert ours["end_over_dense"] == pytest.approx((1.0 + 4.5) / 2 - 1)


def test_a_margin_is_a_share_of_the_loss_of_dense(tmp_path: Path) -> None:
    made = plan(tmp_path, margins=(0.0, 0.25))
    runs = make_runs(made)
    put_all(runs)
    rows = {(r["margin"], r["rate"], r["method"]): r for r in make_rows(made, runs, {})}
    assert len(rows) == 2 * 2 * 4
    dense = rows[0.25, "1gbit", "dense"]
    assert (dense["target"], dense["steps"]) == (pytest.approx(2.5), 8), "the mean of 3, 2.5 and 2"
    assert dense["end_over_dense"] == rows[0.0, "1gbit", "dense"]["end_over_dense"] == 0.0


def test_rows_whose_runs_failed_say_why(tmp_path: Path) -> None:
    made = plan(tmp_path)
    runs = make_runs(made)
    put_all(runs)
    broken = runs["code", "100mbit", FP16, 0]
    broken.log.unlink()
    rows = rows_by_name(make_rows(made, runs, {broken.log: "it went wrong"}))
    assert rows["100mbit", "fp16"]["error"] == "it went wrong"
    assert "seconds" not in rows["100mbit", "fp16"]
    assert rows["1gbit", "fp16"]["error"] is None
    assert rows["100mbit", "dense"]["error"] is None


def test_a_mean_of_evaluations_is_never_early() -> None:
    log = RunLog(
        {},
        [
            Row(step=i, train_loss=None, val_loss=loss, seconds=i, bytes_sent=i, ratio=None)
            for i, loss in enumerate([5.0, 4.0, 1.0, 4.0, 3.0, 2.0, 2.0, 2.0])
        ],
    )
    assert time_to_loss.smoothed(log)[0] == (2, pytest.approx(10 / 3))
    assert time_to_loss.reach(log, log, 2.0) == (7.0, 7, 7), "one lucky evaluation does not count"
    assert time_to_loss.reach(log, log, 1.9) is None
    short = RunLog({}, log.rows[:2])
    assert time_to_loss.smoothed(short) == [(1, 4.5)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 1.0, 2.0], (2.0, 1.0, 3.0)), ([3.0, None, 2.0], (3.0, 2.0, None)), ([None, 2.0], (None, 2.0, None))],
)
def test_a_seed_that_does_not_reach_the_loss_is_the_latest(
    values: list[float | None], expected: tuple[float | None, ...]
) -> None:
    assert tuple(time_to_loss.spread("x", values).values()) == expected


def test_every_method_has_the_settings_of_the_study() -> None:
    cells = load_study(launching.HERE / "time_to_loss_cells.py")
    assert cells == time_to_loss_cells.CELLS
    for cell in cells:
        if cell.model != "prose-25m":
            assert cell.settings["lr"] == transfer_cells.RATES[cell.model, "adamw"][0]
        if cell.method == "ahead":
            assert cell.density is not None
            assert cell.settings["warmup_steps"] == transfer_cells.warm_up("ahead", cell.density, cell.total_steps)


def test_ours_is_the_preset(tmp_path: Path) -> None:
    way = Way("sparsecomm", 0.001)
    run = make_runs(plan(tmp_path, ways=(LIMIT, DENSE, way), steps=None))["code", "1gbit", way, 0]
    settings = study_gpt.parse(run.command(resume=False)[1:])
    state = make_state(settings)
    assert state is not None
    preset = sc.preset("adamw", density=0.001, warmup_steps=transfer_cells.warm_up("ahead", 0.001, 3000))
    # The optimizer replaces the feedback.
    assert state.config.change(feedback=None) == preset.change(feedback=None)
    assert (settings.optimizer, settings.feedback) == ("adamw", "ahead"), "sc.optim.AdamW"


@pytest.mark.parametrize(
    ("methods", "densities", "said"),
    [
        (("zip",), (0.01,), "method 'zip' does not exist; known are limit, dense, fp16"),
        ((), (0.5,), r"density 0.5: it must be in \(0, 0.25\)"),
        ((), (), "density none"),
    ],
)
def test_bad_methods(methods: tuple[str, ...], densities: tuple[float, ...], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        make_ways(methods, densities)


def test_all_methods_by_default() -> None:
    found = make_ways((), (0.01, 0.001))
    assert [way.method for way in found] == [*time_to_loss.METHODS, "sparsecomm"]
    assert [way.density for way in found if way.ours] == [0.01, 0.001]
    with pytest.raises(LabError, match="rate = 'none'"):
        highest_first(["none"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hosts", "1"], "hosts = 1: 2 at least"),
        (["--seeds", "0"], "seeds = 0"),
        (["--steps", "-1"], "steps = -1"),
        (["--hosts", "64"], "64 pinned hosts needs 64 cores"),
        (["--no-pin", "--tasks", "bert"], "task 'bert' does not exist; known are prose, cnn"),
        (["--no-pin", "--margins", "0,-0.1"], "margins must be in [0, 1), got -0.1"),
        (["--no-pin", "--hosts", "3"], "hosts = 3: they cannot share out a batch of 16, that of prose, evenly"),
    ],
)
def test_the_command_refuses_before_anything_runs(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(["time-to-loss", *options])
    assert ended.value.code == 1
    assert said in capsys.readouterr().err


def test_a_wheel_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "__file__", str(tmp_path / "sparsecomm" / "tools" / "benches" / "time_to_loss.py"))
    with pytest.raises(SystemExit):
        bench(["time-to-loss", "--no-pin"])
    assert f"bench/convergence/time_to_loss.py is missing in {tmp_path}" in capsys.readouterr().err


def test_table_and_pictures(tmp_path: Path) -> None:
    made = plan(tmp_path)
    runs = make_runs(made)
    put_all(runs)
    rows = make_rows(made, runs, {})
    rows[-1] = {key: rows[-1][key] for key in ("task", "rate", "margin", "method", "density", "hosts")} | {
        "error": "it broke"
    }
    result = {"meta": {"hosts": 2, "cores_of_hosts": [0, 1]}, "rows": rows}
    out = io.StringIO()
    command.print_table(result, Console(file=out, width=160))
    lines = out.getvalue().splitlines()
    assert any("code at 100mbit, 2 hosts with a core each, to 2.0000, dense's end" in line for line in lines)
    limit = next(line for line in lines if line.startswith("│ limit"))
    assert "4.00" in limit, "four times as fast as dense"
    assert any("sparsecomm 0.01: it broke" in line for line in lines)
    files = command.plots(result, tmp_path / "plots")
    assert sorted(file.name for file in files) == [
        f"code_{rate}.{kind}" for rate in ("100mbit", "1gbit") for kind in ("png", "svg")
    ]
    text = (tmp_path / "plots" / "code_1gbit.svg").read_text()
    assert all(f"<!--  {name} -->" in text for name in ("dense", "fp16", "no exchange (limit)", "sparsecomm 1%"))


@pytest.mark.slow
def test_short_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun_command(2)  # skips where there is none
    monkeypatch.setattr(time_to_loss, "EVALUATIONS", 4)
    methods = ("powersgd-r1", "sparsecomm")
    made = plan(tmp_path, rates=("200mbit",), ways=make_ways(methods, (0.01,)), seeds=(3,), steps=8)
    runs = make_runs(made)
    console = Console(file=io.StringIO())
    assert _do(made, runs, console) == {}
    rows = rows_by_name(make_rows(made, runs, {}))
    assert [name for _, name in rows] == ["limit", "dense", *methods]
    for row in rows.values():
        assert row["error"] is None
        assert row["end_loss"] < row["curve"][0][3], "it learns"
        assert [point[0] for point in row["curve"]] == [0, 2, 4, 6, 8]
    sent = {name: row["curve"][-1][2] for (_, name), row in rows.items()}
    assert sent["limit"] == 0
    assert sent["dense"] == 8 * 4 * rows["200mbit", "dense"]["numel"], "a ring of two sends n elements from each"
    assert 0 < sent["powersgd-r1"] < sent["dense"] / 2, "the first two steps are whole"
    assert rows["200mbit", "dense"]["reached"] == rows["200mbit", "limit"]["reached"] == 1
    written = {run.log: run.log.stat().st_mtime_ns for run in runs.values()}
    lab: Any = None  # nothing is to be done, so no lab is made
    again = time_to_loss.measure(made, lab, console)
    assert rows_by_name(again) == rows
    assert {path: path.stat().st_mtime_ns for path in written} == written


def _do(made: Plan, runs: dict[time_to_loss.Key, Run], console: Console) -> dict[Path, str]:
    """Does the runs in a lab, or else on this machine."""
    if missing() is not None:
        mpirun = launching.find_mpirun()
        assert mpirun is not None
        local: Callable[[int], list[str]] = partial(launching.launch_line, mpirun)
        return do_runs(made, runs, local, None, console)
    with Lab(hosts=2, name=f"t{os.getpid()}loss", pin=len(os.sched_getaffinity(0)) > 1) as lab:
        return do_runs(made, runs, in_lab(lab), lab, console)


def test_only_whole_runs_are_finished(tmp_path: Path) -> None:
    made = plan(tmp_path)
    run = next(iter(make_runs(made).values()))
    put(run, LOSSES, 1.0, 1)
    assert finished(run) is not None
    assert finished(replace(run, flags={**run.flags, "steps": 11})) is None
