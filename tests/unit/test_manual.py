"""`allreduce_gradients` in a world of one: division into flat buckets, and the way back of the averages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm.ddp import by_hand


@pytest.fixture(scope="module", autouse=True)
def world() -> sc.World:
    return sc.init()


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12), st.integers(1, 300))
def test_buckets_hold_every_parameter_once_last_first_of_one_dtype(sizes: list[tuple[int, bool]], limit: int) -> None:
    parameters = [torch.zeros(n, dtype=torch.float16 if half else torch.float32) for n, half in sizes]
    buckets = by_hand._buckets(parameters, limit)
    assert [id(p) for b in buckets for p in b] == [id(p) for p in reversed(parameters)]
    for bucket in buckets:
        assert len({p.dtype for p in bucket}) == 1
        assert len(bucket) == 1 or sum(p.numel() * p.element_size() for p in bucket) <= limit


LAYOUTS = {
    "contiguous": lambda: torch.arange(24.0, dtype=torch.float32).reshape(4, 3, 2),
    "transposed": lambda: torch.arange(24.0, dtype=torch.float32).reshape(4, 3, 2).permute(2, 0, 1),
    "channels-last": lambda: (
        torch.arange(48.0, dtype=torch.float32).reshape(2, 3, 4, 2).to(memory_format=torch.channels_last)
    ),
    "one channel": lambda: (
        torch.arange(12.0, dtype=torch.float32).reshape(3, 1, 2, 2).to(memory_format=torch.channels_last)
    ),
    "gaps": lambda: torch.arange(24.0, dtype=torch.float32).reshape(4, 6)[:, ::2],
    "expanded": lambda: torch.arange(4.0, dtype=torch.float32).reshape(4, 1).expand(4, 3),
    "scalar": lambda: torch.tensor(2.0, dtype=torch.float32),
    "empty": lambda: torch.zeros(0, 3, dtype=torch.float32),
}
each_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


@each_layout
@pytest.mark.parametrize("like", [True, False], ids=["grad like parameter", "grad contiguous"])
def test_flattening_and_giving_back_is_the_identity(make: object, like: bool) -> None:
    parameter = torch.nn.Parameter(make())  # type: ignore[operator]
    grad = torch.randn(parameter.shape, dtype=torch.float32)
    parameter.grad = torch.empty_like(parameter).copy_(grad) if like else grad.clone()
    flat = by_hand._flat_grad(parameter, "weight").clone()
    assert flat.shape == (parameter.numel(),)
    parameter.grad.zero_()
    by_hand._give_back([parameter], flat)
    assert torch.equal(parameter.grad, grad)


@each_layout
def test_a_parameter_without_a_gradient_gets_the_average(make: object) -> None:
    parameter = torch.nn.Parameter(make())  # type: ignore[operator]
    assert not by_hand._flat_grad(parameter, "weight").any()
    average = torch.randn(parameter.numel(), dtype=torch.float32)
    by_hand._give_back([parameter], average)
    assert parameter.grad is not None
    assert parameter.grad.shape == parameter.shape
    assert sorted(parameter.grad.reshape(-1).tolist()) == sorted(average.tolist())


def test_the_gradient_tensor_itself_stays() -> None:
    """Optimizers with foreach and hooks may hold references to it."""
    model = torch.nn.Linear(3, 2, dtype=torch.float32)
    state = sc.SparseState(sc.TopK(1.0), model=model, value_codec="fp32")
    model(torch.ones(1, 3, dtype=torch.float32)).sum().backward()
    held = model.weight.grad
    sc.allreduce_gradients(model, state)
    assert model.weight.grad is held


def test_a_state_without_its_model_says_what_to_do() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float32)
    model(torch.ones(1, 3, dtype=torch.float32)).sum().backward()
    with pytest.raises(sc.ConfigError, match="model="):
        sc.allreduce_gradients(model, sc.SparseState(sc.TopK(0.1)))


def test_a_state_of_another_model_says_so() -> None:
    model, other = torch.nn.Linear(3, 2, dtype=torch.float32), torch.nn.Linear(3, 2, dtype=torch.float32)
    model(torch.ones(1, 3, dtype=torch.float32)).sum().backward()
    with pytest.raises(sc.ConfigError, match="one SparseState serves one model"):
        sc.allreduce_gradients(model, sc.SparseState(sc.TopK(0.1), model=other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused_and_gradients_stay(dtype: torch.dtype) -> None:
    model = torch.nn.ParameterList(
        [torch.nn.Parameter(torch.ones(3, dtype=torch.float32)), torch.nn.Parameter(torch.ones(3, dtype=dtype))]
    )
    for p in model:
        p.grad = torch.full_like(p, 2.0)
    with pytest.raises(sc.ConfigError, match=str(dtype)):
        sc.allreduce_gradients(model, sc.SparseState(sc.TopK(0.1), model=model))
    assert all(bool((p.grad == 2).all()) for p in model)


def test_a_sparse_gradient_is_refused_with_the_remedy() -> None:
    model = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float32)
    model(torch.tensor([1], dtype=torch.int64)).sum().backward()
    with pytest.raises(sc.ConfigError, match="sparse=False"):
        sc.allreduce_gradients(model, sc.SparseState(sc.TopK(0.1), model=model))


@pytest.mark.parametrize("bucket_bytes", [0, -1, None])
def test_bucket_sizes_that_are_none_are_refused_by_value(bucket_bytes: object) -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float32)
    model(torch.ones(1, 3, dtype=torch.float32)).sum().backward()
    with pytest.raises(sc.ConfigError, match=f"bucket_bytes.*{bucket_bytes}"):
        sc.allreduce_gradients(model, sc.SparseState(sc.TopK(0.1), model=model), bucket_bytes=bucket_bytes)  # type: ignore[arg-type]
