"""Models that are split over ranks, by tensors and by layers, alone and with sparse averages over their replicas."""

from __future__ import annotations

import sys

import pytest
from helpers import JOBS, ROOT, mpirun_command, run_job

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("what", "ranks"),
    [
        ("tensors_dense", 4),
        ("layers_dense", 4),
        ("tensors_sparse", 4),
        ("layers_sparse", 4),
        ("gpipe", 2),
        ("gpipe", 4),
        ("one_forward_one_backward", 4),
    ],
)
def test_a_split_model_trains_as_a_whole_one(what: str, ranks: int) -> None:
    job = run_job([*mpirun_command(ranks), sys.executable, JOBS / "hybrid.py", what], deadline=120.0)
    assert job.code == 0, job
    assert sorted(job.out.splitlines()) == sorted(f"{what} {rank}" for rank in range(ranks)), job


@pytest.mark.parametrize("way", ["--tensor", "--pipeline"])
def test_the_example_has_an_optimizer_that_fits(way: str) -> None:
    flags = [way, "2", "--steps", "20"]
    job = run_job([*mpirun_command(4), sys.executable, ROOT / "mpi_examples" / "hybrid.py", *flags], deadline=150.0)
    assert job.code == 0, job
    assert "step 20: training loss" in job.out, job
    assert "times fewer bytes than dense" in job.out, job
    assert "ConvergenceWarning" not in job.err, job
