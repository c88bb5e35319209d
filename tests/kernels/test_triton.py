"""The Triton kernels, run by Triton's interpreter on the CPU, equal the reference bit for bit.

This tests their logic. test_triton_compiles.py shows that they compile for a GPU; tests/gpu checks a GPU's results.
"""

from __future__ import annotations

import subprocess
import sys

import cases
import pytest
import torch
from helpers import ROOT, job_environment
from vectors import DTYPES, KINDS, vector

from sparsecomm import kernels
from sparsecomm.errors import ConfigError, KernelError
from sparsecomm.types import IndexCodec, ValueCodec

runs = "triton" in kernels.available_paths()
interpreted = pytest.mark.skipif(not runs, reason="Triton's interpreter cannot run here: no triton, or a GPU is there")


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 129, 4097])
def test_selecting_by_threshold(n: int, kind: str) -> None:
    for seed in range(KINDS.index(kind), KINDS.index(kind) + (3 if n < 4097 else 2)):
        cases.check_select("cpu", n, kind, seed)


@interpreted
@pytest.mark.parametrize("kind", ["normal", "clustered", "equal"])
def test_selecting_from_several_groups_of_blocks(kind: str) -> None:
    cases.check_select("cpu", 40_000, kind, 3)  # everything is selected, which overflows every slot
    cases.check_select("cpu", 40_000, kind, 4)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "share"), [(0, 1.0), (1, 1.0), (129, 0.1), (129, 1.0), (9000, 0.01)])
def test_exact_topk(n: int, share: float, kind: str) -> None:
    cases.check_topk("cpu", n, kind, KINDS.index(kind), int(share * n))


@interpreted
@pytest.mark.parametrize("kind", ["normal", "clustered", "zeros", "two-valued", "nonfinite", "tail"])
def test_exact_topk_by_a_sample_or_misled_by_it(kind: str) -> None:
    cases.check_topk("cpu", 70_001, kind, 4, 700)


@interpreted
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
@pytest.mark.parametrize("k", [0, 1, 99, 300])
def test_cutting_a_selection(kind: str, k: int) -> None:
    cases.check_cut("cpu", 300, kind, k)


@interpreted
@pytest.mark.parametrize(("n", "chunk"), [(0, 1), (1, 7), (1000, 7), (1000, 32), (5000, 1000), (5000, 9000)])
def test_adding_up(n: int, chunk: int) -> None:
    cases.check_adding("cpu", n, chunk, n + 1)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(), (0,), (5, 0, 400), (9000, 1, 3000)])
def test_reducing_parts_in_order(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    for n, scale in ((0, 1.0), (1, 0.5), (4096, 1.0), (9000, 1 / 3)):
        cases.check_reduce("cpu", n, dtype, scale, sizes)


@interpreted
@pytest.mark.parametrize("codec", [c for c in IndexCodec if c != IndexCodec.DENSE])
@pytest.mark.parametrize("numel", [1, 129, 5_000, 2**31 + 5, 2**32])
def test_index_codecs(codec: IndexCodec, numel: int) -> None:
    if codec == IndexCodec.BITMAP and numel > 10**6:
        numel = 20_000  # a bitmap of 512 MB tests nothing more
    for nnz in (0, 1, 128, 129, 400):
        for clustered in (False, True):
            indices = cases.positions(numel, min(nnz, numel), nnz, clustered=clustered)
            cases.check_index_codec("cpu", codec, indices, numel)
    if numel <= 5_000:
        cases.check_index_codec("cpu", codec, torch.arange(numel, dtype=torch.int64).to(torch.uint32), numel)


@interpreted
def test_all_positions_take_no_bytes() -> None:
    cases.check_index_codec("cpu", IndexCodec.DENSE, torch.arange(300, dtype=torch.int64).to(torch.uint32), 300)


@interpreted
@pytest.mark.parametrize("codec", list(ValueCodec))
def test_value_codecs(codec: ValueCodec) -> None:
    for n in (0, 1, 129, 1100):
        for kind in KINDS:
            values = vector(kind, n, n)
            cases.check_value_codec("cpu", codec, values if kind == "nonfinite" else torch.nan_to_num(values))
    cases.check_value_codec("cpu", codec, torch.tensor([3.4e38, -3.4028234e38, 1e-45, -0.0], dtype=torch.float32))


@interpreted
def test_hostile_bytes_get_the_references_verdict() -> None:
    for codec in IndexCodec:
        if codec != IndexCodec.DENSE:
            assert cases.check_hostile_indices("cpu", codec, 40) > 10
    cases.check_hostile_values("cpu")
    cases.check_unsorted("cpu")


@interpreted
def test_unfit_tensors_are_refused_by_name() -> None:
    kernels.set_path("triton")
    try:
        with pytest.raises(KernelError, match="float64"):
            kernels.accumulate_dense(torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float32))
        assert kernels.crc32c(b"123456789") == 0xE3069283
    finally:
        kernels.set_path(None)


def test_triton_is_no_path_for_cpu_tensors_without_its_interpreter() -> None:
    environment = {**job_environment(), "SPARSECOMM_KERNELS": "triton"}
    environment.pop("TRITON_INTERPRET", None)
    code = "from sparsecomm import kernels; kernels.current_path()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1
    assert ConfigError.__name__ in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr or "not installed" in done.stderr
