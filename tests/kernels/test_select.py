"""Selection on every path equals the reference bit for bit, loses nothing, and takes the right elements."""

from __future__ import annotations

import math

import pytest
import torch
from by_path import by_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vectors import DTYPES, kinds, same_bits, seeds, sizes, vector

from sparsecomm import kernels
from sparsecomm.errors import KernelError

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def empty(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(n, dtype=torch.uint32), torch.empty(n, dtype=torch.float32)


def accumulated(grad: torch.Tensor, residual: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums and where they are finite."""
    acc = residual + grad.float() * torch.tensor(scale, dtype=torch.float32)
    return acc, torch.isfinite(acc)


@many
@given(
    n=sizes,
    kind=kinds,
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-42, 0.5, 1.0, 2.5, 1e30, math.inf]),
    room=st.sampled_from([0, 1, 15, 16, 17, None]),
    scale=st.sampled_from([1.0, 0.5, 1 / 3]),
)
def test_accumulate_select_equals_the_reference(
    path: str,
    n: int,
    kind: str,
    seed: int,
    dtype: torch.dtype,
    offset: int,
    threshold: float,
    room: int | None,
    scale: float,
) -> None:
    grad, before = vector(kind, n, seed, dtype, offset=offset), vector("normal", n, seed + 1, offset=offset)
    capacity = n if room is None else room
    mine, truth = before.clone(), before.clone()
    out, expected = empty(capacity), empty(capacity)
    got = kernels.accumulate_select(grad, mine, threshold, *out, scale=scale)
    want = by_reference(path, lambda: kernels.accumulate_select(grad, truth, threshold, *expected, scale=scale))
    assert got == want
    assert same_bits(mine, truth)
    assert torch.equal(out[0][: got.stored], expected[0][: got.stored])
    assert same_bits(out[1][: got.stored], expected[1][: got.stored])
    acc, finite = accumulated(grad, before, scale)
    assert got.nonfinite == n - int(finite.sum())
    rebuilt = mine.clone()
    rebuilt[out[0][: got.stored].to(torch.int64)] = out[1][: got.stored]
    assert same_bits(rebuilt[finite] + 0.0, acc[finite] + 0.0), "sent + kept = residual + gradient"
    assert same_bits(mine[~finite], before[~finite]), "non-finite sums leave the residual alone"


@many
@given(
    n=sizes,
    kind=kinds,
    seed=seeds,
    dtype=st.sampled_from([None, *DTYPES]),
    offset=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]),
    extra=st.integers(0, 2),
)
def test_exact_topk_equals_the_reference(
    path: str, n: int, kind: str, seed: int, dtype: torch.dtype | None, offset: int, share: float, extra: int
) -> None:
    k = min(n, int(share * n) + extra)
    before = vector(kind if dtype is None else "normal", n, seed + 1, offset=offset)
    grad = None if dtype is None else vector(kind, n, seed, dtype, offset=offset)
    mine, truth = before.clone(), before.clone()
    out, expected = empty(k), empty(k)
    got = kernels.exact_topk(grad, mine, k, *out)
    want = by_reference(path, lambda: kernels.exact_topk(grad, truth, k, *expected))
    assert got == want
    assert same_bits(mine, truth)
    assert torch.equal(out[0][: got.stored], expected[0][: got.stored])
    assert same_bits(out[1][: got.stored], expected[1][: got.stored])


@many
@given(n=sizes, kind=kinds, seed=seeds, share=st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_exact_topk_takes_the_largest_and_ties_to_the_lowest_index(
    path: str, n: int, kind: str, seed: int, share: float
) -> None:
    acc = vector(kind, n, seed)
    k = min(n, max(1, int(share * n)))
    residual, (indices, values) = acc.clone(), empty(k)
    got = kernels.exact_topk(None, residual, k, indices, values)
    candidates = [(-abs(float(x)), i) for i, x in enumerate(acc.tolist()) if math.isfinite(x) and x != 0.0]
    expected = sorted(i for _, i in sorted(candidates)[:k])
    assert indices[: got.stored].to(torch.int64).tolist() == expected
    finite = torch.where(torch.isfinite(acc), acc, 0.0).double()
    left = torch.where(torch.isfinite(residual), residual, 0.0).double()
    bound = (1 - k / n) * float(finite.square().sum()) if n else 0.0
    assert float(left.square().sum()) <= bound * (1 + 1e-9) + 1e-300, "contraction"


@many
@given(
    n=sizes, kind=st.sampled_from(["normal", "ties", "equal", "denormal", "wide"]), seed=seeds, k=st.integers(0, 300)
)
def test_cut_topk_equals_the_reference_and_gives_the_rest_back(path: str, n: int, kind: str, seed: int, k: int) -> None:
    values = vector(kind, n, seed)
    values = values[(values != 0.0) & torch.isfinite(values)].clone()
    count = values.numel()
    indices = (3 * torch.arange(count, dtype=torch.int64)).to(torch.uint32)
    residual = torch.zeros(3 * count + 1, dtype=torch.float32)
    mine = indices.clone(), values.clone(), residual.clone()
    truth = indices.clone(), values.clone(), residual.clone()
    got = kernels.cut_topk(mine[0], mine[1], count, k, mine[2])
    want = by_reference(path, lambda: kernels.cut_topk(truth[0], truth[1], count, k, truth[2]))
    assert got == want == min(k, count)
    assert torch.equal(mine[0][:got], truth[0][:got])
    assert same_bits(mine[1][:got], truth[1][:got])
    assert same_bits(mine[2], truth[2])
    dense = mine[2].clone()
    dense[mine[0][:got].to(torch.int64)] = mine[1][:got]
    assert torch.equal(dense[indices.to(torch.int64)], values)


@pytest.mark.parametrize("kind", ["normal", "equal", "two-valued", "clustered", "tail", "sorted", "zeros"])
@pytest.mark.parametrize("share", [0.001, 0.1])
def test_large_vectors_take_the_fast_way_and_agree(path: str, kind: str, share: float) -> None:
    n = 1_500_007
    grad, before = vector(kind, n, 5), vector("normal", n, 6) * 0.1
    mine, truth, k = before.clone(), before.clone(), int(share * n)
    out, expected = empty(k), empty(k)
    assert kernels.exact_topk(grad, mine, k, *out) == by_reference(
        path, lambda: kernels.exact_topk(grad, truth, k, *expected)
    )
    assert same_bits(mine, truth)
    assert torch.equal(out[0], expected[0])


def test_unfit_tensors_are_refused_by_name(path: str) -> None:
    out = empty(4)
    with pytest.raises(KernelError, match="4"):
        kernels.accumulate_select(torch.zeros(3, dtype=torch.float32), torch.zeros(4, dtype=torch.float32), 1.0, *out)
    with pytest.raises(KernelError, match="float64"):
        kernels.accumulate_select(torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float32), 1.0, *out)
    with pytest.raises(KernelError):
        kernels.accumulate_select(
            torch.zeros(8, dtype=torch.float32)[::2], torch.zeros(4, dtype=torch.float32), 1.0, *out
        )
    with pytest.raises(KernelError):
        kernels.accumulate_select(
            torch.zeros(4, dtype=torch.float32), torch.zeros(4, dtype=torch.float32), float("nan"), *out
        )
    with pytest.raises(KernelError):
        kernels.exact_topk(torch.zeros(8, dtype=torch.float32), torch.zeros(8, dtype=torch.float32), 5, *out)
