"""The benches run at a small size and give the rows that are documented."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch
from helpers import job_environment

from sparsecomm import kernels
from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import gpu
from sparsecomm.tools.benches import kernels as kernel_bench
from sparsecomm.tools.benches import wire as wire_bench


def test_kernel_rows() -> None:
    result = kernel_bench.run(numel=200_000, densities=(0.01,), repeats=2)
    assert {"cpu", "torch", "date"} <= set(result["meta"])
    ops = {row["op"] for row in result["rows"]}
    assert ops == {"accumulate_select", "exact_topk", "encode", "decode_add"}
    for row in result["rows"]:
        assert {"op", "path", "density", "numel", "seconds"} <= set(row)
        assert row["seconds"] > 0
    kernel_bench.print_table(result)


def test_wire_rows() -> None:
    result = wire_bench.run(numel=200_000, densities=(0.01,), repeats=2)
    rice = next(r for r in result["rows"] if str(r.get("index_codec")).lower() == "rice")
    assert rice["index_bits"] <= 1.06 * rice["entropy_bits"]
    assert any("value_bits" in r for r in result["rows"])
    wire_bench.print_table(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"device = 'cuda' cannot be measured here: .*CUDA"):
        kernel_bench.run(device="cuda")
    with pytest.raises(ConfigError, match="must be cpu or cuda, got 'meta'"):
        kernel_bench.run(device="meta")


@pytest.mark.skipif("triton" not in kernels.available_paths(), reason="Triton's interpreter cannot run here")
def test_the_rows_of_a_gpu_as_the_interpreter_makes_them() -> None:
    kernels.set_path("triton")
    try:
        rows = gpu.measure(torch.device("cpu"), 5000, (0.001,), 1)
    finally:
        kernels.set_path(None)
    judged = {(row["op"], row["metric"]): row["goal"] for row in rows}
    assert judged == {
        ("copy", "GB/s"): None,
        ("accumulate_select", "x copy"): 1.25,
        ("exact_topk", "x select"): 3.5,
        ("exact_topk", "x torch"): 0.1,
        ("encode + decode + apply", "x select"): 0.25,
        ("select + encode", "ms"): None,  # the goal is for 512 MB
    }
    assert all(row["seconds"] > 0 and row["measured"] > 0 for row in rows)
    kernel_bench.print_table({"meta": {"gpu": "none"}, "rows": rows})


def test_what_the_hook_adds() -> None:
    """Runs in a new process, because it starts a world."""
    code = (
        "from sparsecomm.tools.benches import gpu_hook as g; "
        "r = g.run((0.1,), 8, 2, 'cpu', 16); g.print_table(r); print(r)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=job_environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    row = ast.literal_eval(done.stdout[done.stdout.index("{'meta'") :])["rows"][0]
    assert row["numel"] == 6 * (16 * 16 + 16)
    assert row["step_seconds"] > 0 < row["floor_seconds"]
    assert row["ok"] == "", "a CPU proves nothing about a GPU"
