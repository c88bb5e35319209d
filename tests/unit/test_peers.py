"""`bench train` and `bench peers`: refused options, methods that fail or hang, and the content of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import job_environment, mpirun_command, run_job

from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import methods as registry
from sparsecomm.tools.benches.methods import METHODS, Run, load_plugins, runs_of
from sparsecomm.tools.benches.peers import Jobs, steps_for
from sparsecomm.tools.benches.plots_train import plots
from sparsecomm.tools.benches.tasks import TASKS
from sparsecomm.tools.benches.train import time_to
from sparsecomm.tools.benches.training import Schedule
from sparsecomm.tools.cli.bench import run as bench
from sparsecomm.tools.lab import missing

PLUGINS = Path(__file__).with_name("plugins")
PINNED = sorted(os.sched_getaffinity(0))[:2] if len(os.sched_getaffinity(0)) > 1 else []
FIGURES = {
    "step_seconds": float,
    "step_spread": float,
    "bytes_per_step": int,
    "bytes_are": str,
    "final_loss": float,
    "steps": int,
    "timed_steps": int,
    "world": int,
    "curve": list,
}


def local_jobs(ranks: int, *options: str, limit: float) -> Jobs:
    """Returns jobs of this many ranks on this machine that know the broken methods."""

    def launch(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        job = run_job([*mpirun_command(ranks), *command], deadline=timeout, env={"PYTHONPATH": path})
        return subprocess.CompletedProcess(command, job.code, job.out, job.err)

    path = os.pathsep.join([job_environment()["PYTHONPATH"], str(PLUGINS)])
    return Jobs(launch, ranks, ["--task", "cnn", "--plugins", "broken_methods", *options], limit)


def assert_figures(row: dict[str, Any]) -> None:
    assert row["error"] is None
    for key, kind in FIGURES.items():
        assert isinstance(row[key], kind), (key, row[key])
    assert row["step_seconds"] > 0
    assert row["final_loss"] > 0


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Returns the error output of `bench peers`, which must exit with 1 at once."""
    with pytest.raises(SystemExit) as ended:
        bench(["peers", *options])
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_sparse_methods_run_once_for_each_density_and_others_once() -> None:
    found = runs_of(["ddp-gloo", "sparsecomm-topk", "ddp-gloo"], [0.01, 0.001])
    assert found == [Run("ddp-gloo"), Run("sparsecomm-topk", 0.01), Run("sparsecomm-topk", 0.001)]
    assert [Run.parse(str(r)) for r in found] == found


def test_a_registered_method_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", METHODS.copy())
    registry.method("mine", sparse=True)(METHODS["none"].attach)
    assert runs_of([], [0.5])[-1] == Run("mine", 0.5)
    assert Run("int8-torch") not in runs_of([], [0.5]), "special ones only by name"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "ddp-gloo,zip"], "method 'zip' does not exist; known are none, ddp-gloo"),
        (["--density", "1.5"], "densities must be in (0, 1], got 1.5"),
        (["--rates", "1gbit,fast"], "rate = 'fast'"),
        (["--hosts", "1"], "hosts = 1"),
        (["--hosts", "65"], "65"),
        (["--hosts", "64", "--pin"], "64 pinned hosts needs 64 cores"),
        (["--steps", "3"], "steps = 3: 4 at least"),
        (["--rounds", "0"], "rounds = 0"),
        (["--task-name", "llm"], "task 'llm' does not exist"),
        (["--plugins", "not_a_module"], "plugin 'not_a_module' cannot be imported"),
    ],
)
def test_peers_refuses_before_anything_runs(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *options)


def test_peers_refuses_without_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "no lab can be made here" in refusal(capsys)


def test_peers_refuses_to_run_under_mpirun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    assert "start bench peers once" in refusal(capsys)


def test_too_few_steps_to_time_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps = 3"):
        Schedule(steps=3)


def test_slower_links_get_fewer_steps_and_all_some() -> None:
    numel = 25_198_602
    counts = [steps_for(bits, 4, numel) for bits in (10**8, 10**9, 10**10)]
    assert counts == sorted(counts)
    assert counts[0] >= 4


def test_a_loss_is_reached_at_the_first_point_at_or_below_it() -> None:
    curve = [[1, 0.5, 10, 3.0], [2, 1.0, 20, 2.0], [3, 1.5, 30, 2.5]]
    assert time_to(2.5, curve) == (1.0, 20)
    assert time_to(1.0, curve) == (None, None)
    assert time_to(None, curve) == (None, None)


@pytest.mark.parametrize("name", TASKS)
def test_batches_depend_on_seed_rank_and_step_alone(name: str) -> None:
    chosen = TASKS[name]
    first, again = chosen.examples(0, 1, 5), chosen.examples(0, 1, 5)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    for other in (chosen.examples(1, 1, 5), chosen.examples(0, 2, 5), chosen.examples(0, 1, 6)):
        assert not first[0].equal(other[0])
    assert not first[0].equal(chosen.held_out_examples(0)[0][: chosen.batch])


@pytest.mark.slow
def test_methods_that_fail_are_rows_and_the_others_run() -> None:
    runs = ["needs-what-is-not-there", "ddp-gloo", "fails-everywhere", "fails-on-rank-1", "sparsecomm-topk@0.01"]
    rows = local_jobs(2, "--steps", "5", limit=24.0).rows([Run.parse(text) for text in runs])
    errors = {str(r): row["error"] for r, row in rows.items()}
    assert list(errors) == runs
    assert errors["needs-what-is-not-there"] == "not installed: no module 'a_package_that_nobody_has'"
    assert errors["fails-everywhere"] == "RuntimeError: not on this machine"
    assert errors["fails-on-rank-1"] == "rank 1 of 2 failed with ValueError: rank 1 has had enough"
    dense, sparse = rows[Run("ddp-gloo")], rows[Run("sparsecomm-topk", 0.01)]
    for row in (dense, sparse):
        assert_figures(row)
    assert dense["bytes_per_step"] == 4 * dense["numel"], "a ring of two sends n elements from each"
    assert dense["bytes_are"] == "computed"
    assert sparse["bytes_are"] == "counted"
    assert 0.005 * dense["bytes_per_step"] < sparse["bytes_per_step"] < 0.02 * dense["bytes_per_step"]


@pytest.mark.slow
def test_a_method_that_hangs_is_a_row() -> None:
    rows = local_jobs(1, "--steps", "5", limit=5.0).rows([Run("hangs")])
    assert rows[Run("hangs")]["error"] == "hung: not done after 5 s"


def test_a_job_that_cannot_start_is_an_error_of_its_runs() -> None:
    jobs = Jobs(lambda line, timeout: subprocess.run(["false"], capture_output=True, text=True), 2, [], 5.0)
    rows = jobs.rows([Run("none"), Run("ddp-gloo")])
    assert [row["error"] for row in rows.values()] == ["exit code 1: nothing was printed"] * 2


@pytest.mark.slow
def test_train_in_a_world_of_one_writes_rows_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "train.json"
    command = [sys.executable, "-m", "sparsecomm", "bench", "train", "--methods", "ddp-gloo,bf16,sparsecomm-topk"]
    command += ["--density", "0.1", "--steps", "8", "--eval-every", "4", "--json", file, "--plot", tmp_path]
    job = run_job(command, deadline=120.0)
    assert job.code == 0, str(job)
    result = json.loads(file.read_text())
    assert [(r["method"], r["density"]) for r in result["rows"]] == [
        ("none", None),
        ("ddp-gloo", None),
        ("bf16", None),
        ("sparsecomm-topk", 0.1),
    ]
    none, ddp, bf16, sparse = result["rows"]
    assert "NCCL" in bf16["error"]
    assert none["final_loss"] == pytest.approx(ddp["final_loss"], rel=1e-5), "alone, averaging changes nothing"
    for row in (none, ddp, sparse):
        assert_figures(row)
        assert row["exposed_seconds"] == pytest.approx(row["step_seconds"] - none["step_seconds"])
        assert [point[0] for point in row["curve"]] == [4, 8]
    assert result["meta"]["target"] == max(ddp["final_loss"], sparse["final_loss"])
    assert sparse["seconds_to_target"] > 0
    names = {f"train_loss_by_{what}.{kind}" for what in ("time", "bytes") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"train.json"} | names


@pytest.mark.slow
def test_steps_in_turns(tmp_path: Path) -> None:
    file = tmp_path / "turns.json"
    command = [*mpirun_command(2), sys.executable, "-m", "sparsecomm", "bench", "turns", "--tasks", "cnn"]
    command += ["--methods", "ddp-silent,sparsecomm-topk", "--density", "0.1", "--steps", "6", "--json", str(file)]
    job = run_job(command, deadline=120.0)
    assert job.code == 0, str(job)
    rows = json.loads(file.read_text())["rows"]
    assert [(r["method"], r["density"], r["against"]) for r in rows] == [
        ("ddp-silent", None, "ddp-gloo"),
        ("sparsecomm-topk", 0.1, "ddp-gloo"),
    ]
    for row in rows:
        assert 0.0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["ok"] == ("ok" if row["ratio"] <= row["goal"] else "MISS")
        assert row["steps"] == 6
    bench_again = run_job([sys.executable, "-m", "sparsecomm", "bench", "turns", "--steps", "1"], deadline=60.0)
    assert bench_again.code == 1
    assert "steps = 1: 2 at least" in bench_again.err


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_peers_between_two_real_hosts(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    command = [sys.executable, "-m", "sparsecomm", "bench", "peers", "--hosts", "2", "--rates", "50mbit"]
    command += ["--methods", "ddp-gloo,sparsecomm-topk", "--density", "0.01", "--task-name", "cnn", "--steps", "6"]
    command += ["--rounds", "1", "--loss-steps", "0", "--json", file, *(["--pin"] if PINNED else [])]
    job = run_job(command, deadline=120.0)
    assert job.code == 0, str(job)
    result = json.loads(file.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["none", "ddp-gloo", "sparsecomm-topk"]
    assert result["meta"]["cores_of_hosts"] == (PINNED or None)
    for row in rows.values():
        assert_figures(row)
        assert row["rate"] == "50mbit"
        # The interface sends the bytes of the algorithm and the headers of the packets.
        least = row["bytes_per_step"]
        assert least <= row["wire_bytes_per_step"] <= 1.1 * least + 20_000
    # 1.19 MB at 50 Mbit/s take 0.19 s, whatever the processor does.
    assert rows["ddp-gloo"]["exposed_seconds"] > 0.1
    assert plots(result, tmp_path)
    assert not (Path("/run/netns").exists() and any(p.name.startswith("peers") for p in Path("/run/netns").iterdir()))


def test_an_unknown_plugin_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such_plugin"):
        load_plugins(["no_such_plugin"])
