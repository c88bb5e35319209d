"""The convergence study's driver: real runs that are really killed, and its numbers from logs made up to be known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpointing
import convergence
import convergence_cells
import convergence_runs
import launching
import pytest
import study_gpt
from convergence_study import Cell, Conditions, StudyError, load_study, make_run
from helpers import job_environment, mpirun_command
from run_log import Row, RunLog

SCRIPT = launching.HERE / "convergence.py"
SMALL = "settings={'batch': 1, 'block': 16, 'lr': 1e-3}"


def study(folder: Path, *cells: str) -> Path:
    path = folder / "study.py"
    path.write_text("from convergence_study import Cell\nCELLS = [" + ",\n".join(cells) + "]\n")
    return path


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes, this one aside, that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_killed_study_leaves_nothing_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mpirun_command(2)  # skips where there is none
    cell = f"Cell(model='gpt', optimizer='adamw', method='topk', density=0.01, seeds=(3,), {SMALL})"
    out = tmp_path / "out"
    flags = ["--study", str(study(tmp_path, cell)), "--out", str(out), "--steps", "160"]
    driver = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        env=job_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: any(map(checkpointing.exists, out.glob("runs/*/*.checkpoints"))), 90)
        assert convergence.main(flags) == 2
        assert "is in use by another convergence.py" in capsys.readouterr().err
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=60)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    assert driver.returncode == 130, said
    assert "the same command goes on" in said
    wait_for(lambda: not processes_of(out), 20)

    assert convergence.main(flags) == 0
    (run,) = out.glob("runs/*/seed-3.txt")
    assert "resumed at step" in run.read_text()
    log = RunLog.read(run.with_suffix(".json"))
    assert [row.step for row in log.rows] == list(range(161))
    assert log.meta["judge"] == "test"
    assert not run.with_name("seed-3.checkpoints").exists()

    written = run.stat().st_mtime_ns
    assert convergence.main(flags) == 0
    assert "1 runs, 1 finished before" in capsys.readouterr().out
    assert run.stat().st_mtime_ns == written, "a finished run is not run again"


def test_tuning_ranks_tries_and_survives_those_that_diverge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = "grid={'lr': (1e30, 1e-2)}"
    cell = f"Cell(model='gpt', optimizer='sgd', method='dense', {SMALL}, {grid})"
    out = tmp_path / "out"
    mpirun_command(2)
    flags = ["--study", str(study(tmp_path, cell)), "--out", str(out), "--steps", "8", "--tune", "gpt-*", "--jobs", "2"]
    assert convergence.main(flags) == 0
    assert "FAILED: study_gpt.py: error: the gradient's norm became" in capsys.readouterr().out
    result = json.loads((out / "tune" / "gpt-sgd-dense.json").read_text())
    assert [row["settings"]["lr"] for row in result["rows"]] == [1e-2, 1e30]
    assert result["rows"][1]["val_loss"] is None
    logs = [RunLog.read(path) for path in out.glob("runs/*/seed-1000.json")]
    assert {log.meta["judge"] for log in logs} == {"validation"}


DENSE = Cell(model="gpt", optimizer="adamw", method="dense", seeds=(0, 1))
TOPK = Cell(model="gpt", optimizer="adamw", method="topk", density=0.01, seeds=(0, 1, 2), settings={"warmup_steps": 3})
MADE_UP = (
    "Cell(model='gpt', optimizer='adamw', method='dense', seeds=(0, 1))",
    "Cell(model='gpt', optimizer='adamw', method='topk', density=0.01, seeds=(0, 1, 2), settings={'warmup_steps': 3})",
)


def put(cell: Cell, out: Path, seed: int, losses: dict[int, float], sent: int) -> None:
    """A finished run of ten steps with known losses, where every step sends ``sent`` bytes."""
    run = make_run(cell, out, Conditions(judge="test", ranks=2, steps=10), seed=seed)
    flags = ["--lr", "0.002", "--judge", "test", "--steps", "10", "--seed", str(seed)]
    flags += ["--compressor", str(run.flags["compressor"])]
    meta = vars(study_gpt.parse(flags)) | {"dense_bytes_per_step": 4000, "world_size": 2}
    rows = [
        Row(step=i, train_loss=None, val_loss=losses.get(i), seconds=i, bytes_sent=sent * i, ratio=None)
        for i in range(11)
    ]
    RunLog(meta, rows).write(run.log)


def test_report_from_partial_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--study", str(study(tmp_path, *MADE_UP)), "--out", str(out), "--steps", "10", "--report"]
    assert convergence.main(flags) == 2
    assert "no run of these cells is finished" in capsys.readouterr().err
    for seed, end in ((0, 2.0), (1, 3.0)):
        put(DENSE, out, seed, {0: 5.5, 1: 5.0, 5: 4.0, 10: end}, 4000)
    put(TOPK, out, 0, {0: 5.5, 1: 5.3, 5: 4.5, 8: 2.0, 10: 1.9}, 100)
    put(TOPK, out, 2, {0: 5.5, 1: 5.3, 5: 4.5, 8: 4.0, 10: 3.7}, 100)
    assert convergence.main([*flags, "--only", "gpt-adamw-topk-0.01"]) == 0
    document = json.loads((out / "report.json").read_text())
    (row,) = document["rows"]
    assert row["seeds"] == [0, 2]
    assert row["missing"] == [1]
    assert row["loss"] == pytest.approx({"mean": 2.8, "low": 1.9, "high": 3.7})
    assert row["compared"] == 1, "dense has no seed 2"
    assert row["loss_over_dense"] == pytest.approx(-0.05)
    assert row["bytes_in_all"] == 1000
    assert row["bytes_per_step"] == 100
    assert row["fewer"] == 40
    assert (row["dense_at_equal_bytes"], row["dense_steps_at_equal_bytes"]) == (5.0, 1)
    assert (row["steps_to_dense"], row["seeds_that_reach_dense"]) == (8, 1)
    assert document["meta"]["missing"] == ["gpt-adamw-topk-0.01 seed 1"]

    put(TOPK, out, 1, {0: 5.5, 1: 5.3, 5: 4.5, 8: 4.0, 10: 3.3}, 100)
    assert convergence.main(flags) == 0
    text = (out / "report.md").read_text()
    for piece in ("| +4.0% |", "not in 10 (1 of 2 seeds did)", "2.9667 (1.9000-3.7000)", "3 of 3", "runs: none"):
        assert piece in text
    for name in ("gpt.png", "gpt.svg"):
        assert (out / name).stat().st_size > 10_000


def test_runs_with_other_settings_are_other_runs(tmp_path: Path) -> None:
    test = Conditions(judge="test", ranks=2)

    def folder(cell: Cell, seed: int = 0, point: dict[str, Any] | None = None, **changes: Any) -> Path:
        return make_run(cell, tmp_path, replace(test, **changes), seed=seed, point=point).folder

    assert folder(TOPK) == folder(TOPK, seed=1)
    others = [folder(TOPK, **c) for c in ({"judge": "validation"}, {"ranks": 3}, {"steps": 9}, {"point": {"lr": 1}})]
    assert len({folder(TOPK), folder(DENSE), *others}) == 6
    shortened = make_run(TOPK, tmp_path, replace(test, steps=3000), seed=0)
    assert shortened.flags["warmup_steps"] == 3
    assert make_run(TOPK, tmp_path, replace(test, steps=100), seed=0).flags["warmup_steps"] == 0


def test_half_written_logs_are_not_finished(tmp_path: Path) -> None:
    put(DENSE, tmp_path, 0, {0: 5.5, 10: 2.0}, 4000)
    run = make_run(DENSE, tmp_path, Conditions(judge="test", ranks=2, steps=10), seed=0)
    log = convergence_runs.finished(run)
    assert log is not None
    RunLog(log.meta, log.rows[:-1]).write(run.log)
    assert convergence_runs.finished(run) is None


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["Cell(model='bert', optimizer='sgd', method='dense')"], "model 'bert' is not one of gpt, digits"),
        (["Cell(model='gpt', optimizer='sgd', method='zip')"], "method 'zip' is not one of"),
        (["Cell(model='gpt', optimizer='lion', method='dense')"], "optimizer 'lion'"),
        (["Cell(model='gpt', optimizer='sgd', method='topk')"], "density is None, but the method is topk"),
        (["Cell(model='gpt', optimizer='sgd', method='dense', settings={'seed': 1})"], "cannot set seed"),
        (["Cell(model='gpt', optimizer='sgd', method='dense', seeds=(1, 1))"], r"seeds must be different numbers"),
        (["Cell(model='gpt', optimizer='sgd', method='dense')"] * 2, "two cells named gpt-sgd-dense"),
        (
            [
                "Cell(model='gpt', optimizer='sgd', method='dense', grid={'lr': (1, 2)})",
                "Cell(model='gpt', optimizer='sgd', method='topk', density=.1, grid={'lr': (1, 2, 3)})",
            ],
            "3 tries, gpt-sgd-dense with 2: give every method the same number",
        ),
        (["nonsense"], "cannot read the study"),
        ([], "defines no CELLS"),
    ],
)
def test_bad_studies(cells: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(study(tmp_path, *cells))


def test_bad_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convergence.main(["--only", "nothing"]) == 2
    assert "no cell matches 'nothing'; there are gpt-adamw-dense" in capsys.readouterr().err
    assert convergence.main(["--study", str(tmp_path / "missing.py")]) == 2
    assert "missing.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convergence.main(["--jobs", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err


def test_the_study_is_whole() -> None:
    assert load_study(launching.HERE / "convergence_cells.py") == convergence_cells.CELLS
    for model in ("gpt", "digits"):
        for optimizer in ("adamw", "sgd"):
            mine = [c for c in convergence_cells.CELLS if (c.model, c.optimizer, c.steps) == (model, optimizer, None)]
            assert {(c.method, c.density) for c in mine} >= {("dense", None), ("topk", 0.01), ("topk", 0.001)}
            assert {len(c.tries()) for c in mine} == {6}
            assert all(len(c.seeds) == 3 for c in mine)
