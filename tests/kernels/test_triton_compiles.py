"""Triton's compiler and ptxas turn every kernel, in every form in which it is started, into code for an H100 or H200.

No GPU is needed for that. Kernels are not run here, only compiled, in a process of its own: in this one they are
interpreted. What is looked at beside success: nothing is fused (the reference rounds products), nothing spills much.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, job_environment

JOB = ROOT / "tests" / "kernels" / "jobs" / "compile_triton.py"


def supported() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.backends import backends

    return "nvidia" in backends


@pytest.mark.skipif(not supported(), reason="needs the package triton with its NVIDIA backend")
def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = job_environment() | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(JOB)], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    names = {form["name"] for form in compiled}
    assert {"_select", "_gather", "_count_digits", "_pack", "_close", "_reduce", "_write"} <= names
    assert {"_sizes", "_unpack", "_count_ones", "_find_ones", "_sum_gaps", "_place", "_plain"} <= names
    assert {"_read", "_read_int8", "_largest", "_bitmap"} <= names
    assert not [form for form in compiled if form["fused"]]
    assert not [form for form in compiled if form["name"] in ("_select", "_collect") and form["spilled"]]
