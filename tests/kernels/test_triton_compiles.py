"""Triton's compiler and ptxas compile every kernel, in every form in which it is started, for an H100 or H200.

No GPU is needed, because kernels are only compiled, not run. A new process compiles them, because in this one they are
interpreted. The test also checks that no product is fused with a sum, because the reference rounds products, and that
the kernels that pass over memory do not spill registers.
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
