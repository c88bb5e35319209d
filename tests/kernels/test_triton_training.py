"""DDP over two ranks with Triton's kernels, interpreted, gives the averages and residuals of the native kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, job_environment, mpirun_command, run_job

from sparsecomm import kernels

JOB = ROOT / "tests" / "gpu" / "jobs" / "averages.py"


@pytest.mark.skipif("triton" not in kernels.available_paths(), reason="Triton's interpreter cannot run here")
def test_averages_and_residuals_are_those_of_the_native_kernels(tmp_path: Path) -> None:
    folders = {path: tmp_path / path for path in ("triton", "default")}
    for path, folder in folders.items():
        folder.mkdir()
        chosen = {"SPARSECOMM_KERNELS": "triton", "TRITON_INTERPRET": "1"} if path == "triton" else {}
        command = [
            *mpirun_command(2),
            sys.executable,
            JOB,
            "cpu",
            "allgather",
            "threshold",
            "float32",
            folder,
            "2",
            "6001",
        ]
        job = run_job(command, deadline=240, env=job_environment() | chosen)
        assert job.code == 0, str(job)
    for rank in range(2):
        mine, truth = (torch.load(folder / f"cpu-{rank}.pt") for folder in folders.values())
        for got, want in zip(mine["averages"], truth["averages"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert mine["state"].keys() == truth["state"].keys()
        assert all(torch.equal(mine["state"][name], residual) for name, residual in truth["state"].items())
        assert any(residual.count_nonzero() for residual in truth["state"].values())
