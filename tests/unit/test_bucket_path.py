"""The files that a bucket enters under MPI are those that docs/architecture.md lists; its calls go down the layers."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from helpers import JOBS, ROOT, mpirun_command, run_job
from test_layers import ORDER

MOST_FILES = 43
UP = {("transport", "ddp"), ("runtime", "ddp"), ("kernels", "wire")}
"""Calls that go up: the engine resumes an exchange or reports its end, the recorder closes a step, and a kernel reads a
property of the header that it was handed."""


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """What rank 0 of two traced."""
    job = run_job([*mpirun_command(2), sys.executable, JOBS / "bucket_path.py"], deadline=90.0)
    assert job.code == 0, job
    found: dict[str, Any] = json.loads(job.out)
    assert found["transport"] == "mpi"
    return found


def layer(file: str) -> str:
    """The room of a file of the package."""
    return file.split("/")[0].removesuffix(".py")


@pytest.mark.slow
def test_the_document_lists_the_files_that_a_bucket_enters(traced: dict[str, Any]) -> None:
    document = (ROOT / "docs" / "architecture.md").read_text()
    block = document.split("<!-- bucket path -->")[1].split("<!-- /bucket path -->")[0]
    listed = re.findall(r"`([\w/]+\.py)`", block)
    assert set(listed) == set(traced["files"])
    assert len(listed) == len(set(listed)) <= MOST_FILES


@pytest.mark.slow
def test_calls_go_down_the_layers(traced: dict[str, Any]) -> None:
    up = {(a, b) for a, b in traced["calls"] if ORDER.index(layer(a)) < ORDER.index(layer(b))}
    assert {(layer(a), layer(b)) for a, b in up} <= UP, up
