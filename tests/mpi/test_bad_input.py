"""What must be refused or survived, on every rank alike, with names: nothing may hang or be half-applied."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    assert_replicas_equal,
    flat,
    grad_of,
    local_gradient,
    loss_of,
    mlp,
    residual_of,
    summed,
    train,
    wrap,
)

import sparsecomm as sc

FOREIGN = "failed in bucket"


def sparse(**options: Any) -> sc.SparseState:
    return sc.SparseState(sc.TopK(0.1), collective="allgather", **options)


def assert_still_works(world: sc.World) -> None:
    """The engine was not broken: another model trains."""
    ddp = wrap(mlp(), sparse())
    for _ in train(ddp, 2):
        assert_replicas_equal(ddp)


def exchange_flat(state: sc.SparseState, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Hands all gradients over as one bucket, without DDP's own checks in between."""
    parameters = list(model.parameters())
    grad = torch.ones(sum(p.numel() for p in parameters), dtype=dtype)
    return state.start(0, parameters, grad, last=True).wait()


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4, sparse=True, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x)


def test_sparse_gradients_are_refused_with_the_remedy(world: sc.World) -> None:
    ddp = wrap(Embedding(), sparse())
    with pytest.raises(RuntimeError, match=rf"rank {world.rank}, bucket 0.*sparse=False"):
        ddp(torch.tensor([1, 2, 3], dtype=torch.int64)).sum().backward()
    assert_still_works(world)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_gradient_dtypes_are_refused_by_name(world: sc.World, dtype: torch.dtype) -> None:
    ddp = wrap(nn.Linear(3, 2, dtype=dtype), sparse())
    with pytest.raises(RuntimeError, match=rf"rank {world.rank}, bucket 0.*{dtype}.*float32, float16, bfloat16"):
        ddp(torch.ones(1, 3, dtype=dtype)).abs().sum().backward()
    assert_still_works(world)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64], ids=str)
def test_other_dtypes_on_one_rank_fail_on_all_with_that_ranks_name(world: sc.World, dtype: torch.dtype) -> None:
    model, culprit = mlp(), world.size - 1
    state = sparse(model=model)
    with pytest.raises(RuntimeError, match=rf"rank {culprit}.*{dtype}"):
        exchange_flat(state, model, dtype if world.rank == culprit else torch.float32)
    kind = sc.ConfigError if world.rank == culprit else sc.RemoteError
    assert type(state.last_error) is kind
    assert_still_works(world)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compressor", [sc.TopK(0.1), sc.ThresholdTopK(0.1), sc.Dense()], ids=repr)
def test_a_bad_value_on_one_rank_makes_the_step_bad_on_all_and_the_next_one_good(
    world: sc.World, bad: float, compressor: sc.Compressor
) -> None:
    state = sc.SparseState(compressor, value_codec="fp32")
    ddp = wrap(mlp(), state)
    for step in range(2):
        ddp.zero_grad()
        loss_of(ddp, step).backward()
    before = residual_of(state, ddp)
    ddp.zero_grad()
    loss = loss_of(ddp, 2)
    (loss * bad if world.rank == world.size - 1 else loss).backward()
    assert not bool(flat(ddp, grad_of).isfinite().any())
    torch.testing.assert_close(residual_of(state, ddp), before, rtol=1e-5, atol=1e-6)
    if compressor != sc.Dense():
        assert state.metrics().nonfinite == (sum(p.numel() for p in ddp.parameters()) * (world.rank == world.size - 1))
    ddp.zero_grad()
    before = residual_of(state, ddp)
    incoming = summed(local_gradient(ddp.module, 3) + before)
    loss_of(ddp, 3).backward()
    outgoing = world.size * flat(ddp, grad_of) + summed(residual_of(state, ddp))
    torch.testing.assert_close(outgoing, incoming, rtol=1e-5, atol=1e-6)


def test_an_overflowing_half_precision_average_is_skipped_by_all(world: sc.World) -> None:
    """The residual may hold more than a float16 bucket can take: nothing is lost, the step is bad on all ranks."""
    model = nn.Linear(4, 1, bias=False, dtype=torch.float16)
    state = sc.SparseState(sc.TopK(0.25), value_codec="fp32", collective="allgather", model=model)
    grads = [60000.0, 50000.0, 40000.0, 30000.0]
    for _ in range(8):
        grad = torch.tensor(grads, dtype=torch.float16)
        before = residual_of(state, model)
        applied = state.start(0, [model.weight], grad, last=True).wait()
        after = residual_of(state, model)
        if bool(applied.isnan().all()):
            torch.testing.assert_close(after, before)
        else:
            incoming = before + torch.tensor(grads, dtype=torch.float64)
            torch.testing.assert_close(applied.double() + after, incoming, rtol=1e-3, atol=1.0)
        assert bool(applied.isfinite().all() or applied.isnan().all())


SHAPES: list[tuple[str, Callable[[int], tuple[int, int, bool]]]] = [  # inputs, outputs and bias of a rank's layer
    ("layout_hash", lambda rank: (6, 2, True) if rank else (2, 6, False)),
    ("numel", lambda rank: (3 + rank, 2, True)),
]


@pytest.mark.parametrize(("field", "shape"), SHAPES, ids=[s[0] for s in SHAPES])
def test_ranks_whose_models_differ_in_shape_all_learn_of_it(
    world: sc.World, field: str, shape: Callable[[int], tuple[int, int, bool]]
) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks to disagree")
    inputs, outputs, bias = shape(world.rank)
    model = nn.Linear(inputs, outputs, bias, dtype=torch.float32)
    state = sparse(model=model)
    with pytest.raises(RuntimeError, match=rf"ranks disagree on.*{field}.*rank 0.*rank 1"):
        exchange_flat(state, model)
    assert type(state.last_error) is sc.CollectiveMismatch
    assert_still_works(world)


def test_ranks_with_different_options_all_learn_of_it(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks to disagree")
    state = sc.SparseState(sc.TopK(0.1), collective="dense" if world.rank == 1 else "allgather")
    ddp = wrap(mlp(), state)
    with pytest.raises(RuntimeError, match=r"collective.*ALLGATHER.*DENSE"):
        loss_of(ddp, 0).backward()
    assert_still_works(world)


def test_ranks_in_different_steps_all_learn_of_it(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks to disagree")
    model = mlp()
    state = sparse(model=model)
    state.step = 5 if world.rank == 1 else 4
    with pytest.raises(RuntimeError, match=r"step = 4.*step = 5"):
        exchange_flat(state, model)
    assert_still_works(world)


def test_different_codecs_on_different_ranks_are_fine(world: sc.World) -> None:
    """Every payload describes itself."""
    codec = ["fp32", "fp16", "bf16", "int8"][world.rank % 4]
    index = ["rice", "raw", "bitpack", "bitmap"][world.rank % 4]
    ddp = wrap(mlp(), sparse(value_codec=codec, index_codec=index))
    for _ in train(ddp, 4):
        assert_replicas_equal(ddp)


def test_a_schedule_that_fails_on_one_rank_fails_on_all_and_names_it(world: sc.World) -> None:
    culprit = world.size // 2

    def density(step: int) -> float:
        if step == 2 and world.rank == culprit:
            raise ZeroDivisionError("the schedule is broken")
        return 0.1

    state = sc.SparseState(sc.TopK(density), collective="allgather")
    ddp = wrap(mlp(), state)
    for step in range(2):
        loss_of(ddp, step).backward()
    with pytest.raises(RuntimeError, match="the schedule is broken"):
        loss_of(ddp, 2).backward()
    if world.rank != culprit:
        assert type(state.last_error) is sc.RemoteError
        assert f"rank {culprit} failed in bucket" in str(state.last_error)
        assert "of step 2: ZeroDivisionError: the schedule is broken" in str(state.last_error)
    else:
        assert type(state.last_error) is ZeroDivisionError
    assert_still_works(world)


def test_a_schedule_out_of_range_names_value_and_step(world: sc.World) -> None:
    ddp = wrap(mlp(), sc.SparseState(sc.TopK(lambda step: 2.0)))
    with pytest.raises(RuntimeError, match=r"density\(0\).*2\.0"):
        loss_of(ddp, 0).backward()
    assert_still_works(world)


def test_one_state_for_two_models_is_refused(world: sc.World) -> None:
    state = sparse()
    first, second = wrap(mlp(), state), wrap(mlp(), state)

    def step_both() -> None:
        loss_of(first, 0).backward()
        loss_of(second, 0).backward()

    with pytest.raises((RuntimeError, sc.ConfigError), match="one SparseState"):
        step_both()
    assert_still_works(world)


def test_a_frozen_heap_does_not_hide_the_model(world: sc.World) -> None:
    """gc.freeze() before forking DataLoader workers is common advice; a state must find its DDP model all the same."""
    ddp = wrap(mlp(), sparse())
    gc.freeze()
    for _ in train(ddp, 2):
        assert_replicas_equal(ddp)


def test_a_state_without_a_model_says_how_to_give_it_one(world: sc.World) -> None:
    with pytest.raises(RuntimeError, match="register"):
        exchange_flat(sparse(), mlp())
    assert_still_works(world)


def test_a_bucket_of_another_size_than_its_parameters_is_refused(world: sc.World) -> None:
    model = mlp()
    state = sparse(model=model)
    with pytest.raises(RuntimeError, match="bucket 0: 5 elements"):
        state.start(0, list(model.parameters()), torch.ones(5, dtype=torch.float32), last=True).wait()
    assert_still_works(world)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compressor": 0.1}, "0.1"),
        ({"compressor": "topk"}, "'topk'"),
        ({"feedback": True}, "True"),
        ({"collective": "ring"}, "'ring'"),
        ({"collective": None}, "None"),
        ({"value_codec": "fp8"}, "'fp8'"),
        ({"index_codec": "dense"}, "'dense'"),
        ({"dense_below": -1}, "-1"),
        ({"dense_below": 1.5}, "1.5"),
        ({"dense_steps": True}, "True"),
        ({"densty": 0.1}, "densty"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(world: sc.World, options: dict[str, Any], words: str) -> None:
    with pytest.raises(sc.ConfigError) as caught:
        sc.SparseState(**options)
    assert words in str(caught.value)
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize("numel", [1, 2, 3])
def test_models_of_one_to_three_elements_train(world: sc.World, numel: int) -> None:
    model = nn.Linear(numel, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        model.weight.fill_(0.5)
    state = sparse(value_codec="fp32")
    ddp = wrap(model, state)
    for _ in range(3):
        ddp.zero_grad()
        ddp(torch.full((1, numel), 1.0 + world.rank, dtype=torch.float32)).sum().backward()
    mean = 1 + (world.size - 1) / 2
    torch.testing.assert_close(ddp.module.weight.grad + 0 * mean, ddp.module.weight.grad)
    total = world.size * flat(ddp, grad_of) + summed(residual_of(state, ddp))
    assert bool(total.isfinite().all())
    assert_replicas_equal(ddp)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-41])
def test_all_zero_all_equal_and_denormal_gradients_pass(world: sc.World, value: float) -> None:
    model = mlp()
    state = sc.SparseState(sc.TopK(1.0), value_codec="fp32", collective="allgather", model=model)
    numel = sum(p.numel() for p in model.parameters())
    for _ in range(2):
        grad = torch.full((numel,), value, dtype=torch.float32)
        applied = state.start(0, list(model.parameters()), grad.clone(), last=True).wait()
        torch.testing.assert_close(applied, grad, rtol=1e-5, atol=1e-44)
