"""The scripts of mpi_examples: short, with their launch line on top, and that line works."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT, Job, mpirun_command, run_job

EXAMPLES = ROOT / "mpi_examples"
HELPERS = {"library_text.py", "tiny_gpt.py"}
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name not in HELPERS)
NAMES = [path.name for path in SCRIPTS]


def launch_line(script: Path) -> str:
    """The third line of a script's docstring, behind the summary and an empty line."""
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert docstring is not None
    summary, empty, line = docstring.splitlines()[:3]
    assert summary.endswith(".")
    assert empty == ""
    return line


def launch(script: Path, *flags: str | Path, ranks: int | None = None) -> Job:
    """Runs a script by its launch line; `flags` override those of the line."""
    if script.name == "train_digits.py":
        pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'sparsecomm[demo]'")
    words = shlex.split(launch_line(script), comments=True)
    command = mpirun_command(int(words[2]) if ranks is None else ranks)
    return run_job([*command, sys.executable, *words[words.index("python") + 1 :], *flags], deadline=150)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_script_is_short_and_begins_with_its_launch_line(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 150
    assert re.fullmatch(rf"    mpirun -n \d+ python mpi_examples/{script.name}( .*)?", launch_line(script))
    assert 'if __name__ == "__main__":' in text


def test_few_files_are_no_scripts() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == HELPERS | set(NAMES)
    for name in HELPERS:
        text = (EXAMPLES / name).read_text()
        assert len(text.splitlines()) <= 150
        assert "__main__" not in text


def test_the_list_names_every_file() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert [name for name in [*NAMES, *HELPERS] if name not in text] == []


RUN_BELOW = {"checkpoints.py", "half_precision.py", "train_digits.py", "train_gpt.py"}


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name not in RUN_BELOW], ids=lambda s: s.name)
def test_launch_line_works(script: Path) -> None:
    job = launch(script, "--steps", "5")
    assert job.code == 0, job


def test_train_gpt_learns_and_says_how_much_it_sent() -> None:
    job = launch(EXAMPLES / "train_gpt.py", "--steps", "40")
    assert job.code == 0, job
    losses = [float(loss) for loss in re.findall(r"training loss ([\d.]+)", job.out)]
    assert 5.5 > losses[0] > losses[1]
    ratio = re.search(r"([\d.]+) times fewer than dense", job.out)
    assert ratio is not None
    assert float(ratio[1]) > 100


def test_digits_are_learnt() -> None:
    job = launch(EXAMPLES / "train_digits.py", "--steps", "100")
    assert job.code == 0, job
    right = re.search(r"([\d.]+)% of the test images right", job.out)
    assert right is not None
    assert float(right[1]) > 80


def test_overflows_lower_the_scale() -> None:
    job = launch(EXAMPLES / "half_precision.py", "--steps", "10")
    assert job.code == 0, job
    scales = [int(scale.replace(",", "")) for scale in re.findall(r"scale ([\d,]+)", job.out)]
    assert 2**24 > scales[0] >= scales[1] > 1


def test_a_resumed_run_is_the_uninterrupted_one_and_ranks_may_change(tmp_path: Path) -> None:
    script = EXAMPLES / "checkpoints.py"
    whole = launch(script, "--out", tmp_path / "whole", "--steps", "20")
    assert whole.code == 0, whole
    first = launch(script, "--out", tmp_path / "parts", "--steps", "10")
    assert first.code == 0, first
    second = launch(script, "--out", tmp_path / "parts", "--steps", "20")
    assert second.code == 0, second
    assert "starts at step 10 with 2 ranks" in second.out
    assert [line for line in whole.out.splitlines() if "loss" in line] == [
        line for line in (first.out + second.out).splitlines() if "loss" in line
    ]
    third = launch(script, "--out", tmp_path / "parts", "--steps", "30", ranks=3)
    assert third.code == 0, third
    assert "starts at step 20 with 3 ranks" in third.out
    assert sorted(path.name for path in (tmp_path / "parts" / "step-30").iterdir()) == [
        *("rank0.pt", "rank1.pt", "rank2.pt", "shared.pt")
    ]


def test_workers_go_on_when_one_dies() -> None:
    command = mpirun_command(5)
    if "--oversubscribe" not in command:
        pytest.skip("only Open MPI has ULFM")
    command[1:1] = ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
    flags = ["--servers", "2", "--kill-worker-at", "5", "--steps", "20"]
    job = run_job([*command, sys.executable, EXAMPLES / "param_server.py", *flags], deadline=150)
    assert job.code == 0, job
    assert "worker 2 kills itself at step 5" in job.out
    assert "step 20: training loss" in job.out
