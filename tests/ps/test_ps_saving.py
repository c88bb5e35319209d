"""Checkpoints of the parameter server under mpirun."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import Job, mpirun_command, run_job

sys.path.insert(0, str(Path(__file__).parent))
import chaos

if "--oversubscribe" not in mpirun_command(1):
    pytest.skip("only Open MPI has ULFM", allow_module_level=True)

SCRIPT = Path(__file__).parent / "jobs" / "saving.py"


def run(folder: Path, servers: int, steps: int, *more: object, ulfm: bool = False) -> Job:
    command = mpirun_command(2 + servers)
    command[1:1] = chaos.ULFM if ulfm else []
    options = ["--folder", folder, "--servers", servers, "--steps", steps, *more]
    return run_job([*command, sys.executable, SCRIPT, *map(str, options)], deadline=200)


def ends(job: Job) -> list[Any]:
    """First and last versions and values of worker 0."""
    assert job.code == 0, job
    found: list[Any] = json.loads(re.findall(r"ENDS (.*)", job.out)[0])
    return found


def test_a_job_whose_first_server_died_resumes_from_what_its_successor_saved(tmp_path: Path) -> None:
    job = run(tmp_path, 3, 15, "--kill", 2, "--at", 7, ulfm=True)
    (_, _), (versions, values) = ends(job)
    assert versions == [15, 15, 15]
    assert "server rank 2 died" in job.err, job
    (again, same), _ = ends(run(tmp_path, 1, 15, "--resume"))
    assert again == [15]
    assert same == values, "the same bits"


def test_runs_are_kept_apart_and_damage_is_told(tmp_path: Path) -> None:
    (_, _), (_, values) = ends(run(tmp_path, 2, 12))
    refused = run(tmp_path, 1, 12)
    assert refused.code != 0, refused
    assert "holds checkpoints of another run" in refused.err, refused
    path = tmp_path / "version-000000010" / "shard-1-of-2.pt"
    data = bytearray(path.read_bytes())
    data[-80] ^= 64
    path.write_bytes(data)
    job = run(tmp_path, 2, 12, "--resume")
    (begins, _), (_, again) = ends(job)
    assert begins == [5, 5]
    assert again == values, "the same bits"
    assert re.search(r"cannot resume from it: .*shard-1-of-2\.pt is damaged.*its checksum is", job.err), job
