"""Two ranks on one GPU average as two ranks on the CPU do, bit for bit; CUDA graphs are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, job_environment, mpirun_command, run_job

from sparsecomm.ddp.gradients import check_gradient
from sparsecomm.errors import ConfigError

JOB = ROOT / "tests" / "gpu" / "jobs" / "averages.py"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("collective", "compressor"),
    [("allgather", "topk"), ("allgather", "threshold"), ("dense", "topk"), ("split_reduce", "topk"), ("auto", "topk")],
)
def test_averages_and_residuals_are_those_of_the_cpu(
    collective: str, compressor: str, dtype: str, tmp_path: Path
) -> None:
    for device in ("cpu", "cuda"):
        chosen = "allgather" if collective == "auto" and device == "cpu" else collective
        command = [*mpirun_command(2), sys.executable, JOB, device, chosen, compressor, dtype, tmp_path]
        job = run_job(command, deadline=240, env=job_environment())
        assert job.code == 0, str(job)
    for rank in range(2):
        mine, truth = (torch.load(tmp_path / f"{device}-{rank}.pt") for device in ("cuda", "cpu"))
        for step, (got, want) in enumerate(zip(mine["averages"], truth["averages"], strict=True)):
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), f"step {step}"
        for name, residual in truth["state"].items():
            assert torch.equal(mine["state"][name], residual), name


def test_a_backward_pass_in_a_cuda_graph_is_refused() -> None:
    grad, graph = torch.zeros(8, device="cuda", dtype=torch.float32), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ConfigError, match="captured into a CUDA graph"):
        check_gradient(grad, "rank 0, bucket 0")
