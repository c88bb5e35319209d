"""study_server.py end to end: a worker dies on the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import launching
import pytest
import study_server
from helpers import mpirun_command, run_job

SCRIPT = launching.HERE / "study_server.py"


def test_learns_digits_though_a_worker_dies(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'sparsecomm[demo]'")
    command = mpirun_command(4)
    if "--oversubscribe" not in command:
        pytest.skip("only Open MPI has ULFM")
    command[1:1] = ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
    log = tmp_path / "log.json"
    flags = ["--steps", "80", "--lr", "5e-3", "--density", "0.1", "--kill-worker-at", "20", "--eval-every", "40"]
    job = run_job([*command, sys.executable, SCRIPT, *flags, "--log", log], deadline=200)
    assert job.code == 0, job
    assert "worker 2 kills itself at step 20" in job.out
    assert "shard 0 goes on without worker rank 2: died after 20 pushes" in job.err
    last = json.loads(log.read_text())["rows"][-1]
    assert last["step"] == 80
    assert last["workers"] == 2
    assert last["versions"] == [80]
    assert last["val_accuracy"] > 0.7


@pytest.mark.parametrize("flags", [["--out", "x"], ["--collective", "dense"], ["--compressor", "none"]])
def test_refuses_what_it_cannot_do(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        study_server.parse(flags)
    assert stopped.value.code == 2
    assert "has no meaning with a parameter server" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--servers", "2"], ["--kill-worker-at", "3"]])
def test_says_how_to_start_it(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'sparsecomm[demo]'")
    with pytest.raises(SystemExit) as stopped:
        study_server.main(flags)
    assert stopped.value.code == 2
    assert "start it with mpirun -n" in capsys.readouterr().err
