"""The results of a GPU equal the reference bit for bit."""

from __future__ import annotations

import cases
import pytest
import torch
from vectors import DTYPES, KINDS, vector

from sparsecomm import kernels
from sparsecomm.errors import KernelError
from sparsecomm.types import IndexCodec, ValueCodec

SIZES = (0, 1, 129, 4097, 40_000, 1_500_007)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_selecting_by_threshold(n: int, kind: str) -> None:
    for seed in range(21 if n < 10**6 else 3):
        cases.check_select("cuda", n, kind, seed + KINDS.index(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_exact_topk(n: int, kind: str) -> None:
    for seed, share in enumerate((0.0, 0.001, 0.01, 0.1, 0.5, 1.0)):
        cases.check_topk("cuda", n, kind, seed + KINDS.index(kind), int(share * n))


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
@pytest.mark.parametrize("k", [0, 1, 99, 30_000])
def test_cutting_a_selection(kind: str, k: int) -> None:
    cases.check_cut("cuda", 30_000, kind, k)


@pytest.mark.parametrize(("n", "chunk"), [(0, 1), (1, 7), (1000, 7), (100_000, 32), (1_500_007, 32_768)])
def test_adding_up(n: int, chunk: int) -> None:
    cases.check_adding("cuda", n, chunk, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(), (0,), (5, 0, 400), (9000, 1, 300_000), (10_000,) * 8])
def test_reducing_parts_in_order(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    for n in (0, 1, 4096, 1_000_001):
        cases.check_reduce("cuda", n, dtype, 1 / 3, sizes)


@pytest.mark.parametrize("codec", [c for c in IndexCodec if c != IndexCodec.DENSE])
@pytest.mark.parametrize("numel", [1, 129, 70_000, 2**31 + 5, 2**32])
def test_index_codecs(codec: IndexCodec, numel: int) -> None:
    if codec == IndexCodec.BITMAP and numel > 10**6:
        numel = 1_000_003
    for nnz in (0, 1, 127, 128, 129, 30_000):
        for clustered in (False, True):
            indices = cases.positions(numel, min(nnz, numel), nnz, clustered=clustered)
            cases.check_index_codec("cuda", codec, indices, numel)


@pytest.mark.parametrize("codec", list(ValueCodec))
def test_value_codecs(codec: ValueCodec) -> None:
    for n in (0, 1, 127, 129, 100_001):
        for kind in KINDS:
            values = vector(kind, n, n)
            cases.check_value_codec("cuda", codec, values if kind == "nonfinite" else torch.nan_to_num(values))
    cases.check_value_codec("cuda", codec, torch.tensor([3.4e38, -3.4028234e38, 1e-45, -0.0], dtype=torch.float32))


def test_hostile_bytes_get_the_references_verdict() -> None:
    for codec in IndexCodec:
        if codec != IndexCodec.DENSE:
            assert cases.check_hostile_indices("cuda", codec, 300) > 100
    cases.check_hostile_values("cuda")
    cases.check_unsorted("cuda")


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(KernelError, match="one device, got cpu, cuda"):
        kernels.accumulate_dense(
            torch.zeros(4, dtype=torch.float32), torch.zeros(4, device="cuda", dtype=torch.float32)
        )


def test_more_than_two_to_the_31_elements() -> None:
    """Some large elements of a vector of zeros have indices above 2**31, so that an offset in 32 bits would wrap."""
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 9 * n:
        pytest.skip(f"needs {9 * n / 2**30:.0f} GiB of free GPU memory")
    places = [0, 5, 2**31 - 1, 2**31, 2**31 + 1, n - 1]
    values = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, 6.0], device="cuda", dtype=torch.float32)
    for k, expected in ((6, places), (2, places[-2:])):
        residual = torch.zeros(n, device="cuda", dtype=torch.float32)
        residual[places] = values
        indices = torch.empty(6, dtype=torch.uint32, device="cuda")
        found = torch.empty(6, device="cuda", dtype=torch.float32)
        got = kernels.exact_topk(None, residual, k, indices, found)
        assert got.stored == k
        assert indices[:k].cpu().to(torch.int64).tolist() == expected
        assert torch.equal(found[:k], values[-k:])
        assert residual[expected].count_nonzero() == 0
        kernels.scatter_add(residual, indices[:k], found[:k])
        assert torch.equal(residual[places], values)
        del residual
