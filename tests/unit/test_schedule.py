"""Densities: accepted and refused values, and the density of each schedule at each step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.compress import Constant, Dense, Geometric, ThresholdTopK, TopK, Warmup, density_at
from sparsecomm.errors import ConfigError

BAD_DENSITIES: list[Any] = [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf, -math.inf, True, False, "0.1", None, [0.1]]


@pytest.mark.parametrize("bad", BAD_DENSITIES, ids=repr)
@pytest.mark.parametrize("make", [TopK, ThresholdTopK, Constant])
def test_a_bad_density_is_refused_by_value(make: Any, bad: Any) -> None:
    with pytest.raises(ConfigError, match="density") as caught:
        make(bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", BAD_DENSITIES, ids=repr)
def test_a_warmup_refuses_bad_stages_and_finals(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"Warmup.densities\[1\]"):
        Warmup((0.5, bad), 10, 0.1)
    with pytest.raises(ConfigError, match=r"Warmup.final"):
        Warmup((0.5,), 10, bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3", True, None])
def test_a_warmup_refuses_bad_stage_lengths(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"steps_per_stage") as caught:
        Warmup((0.5,), bad, 0.1)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "3", True, None])
def test_an_interval_is_a_positive_int(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"ThresholdTopK.interval") as caught:
        ThresholdTopK(0.1, interval=bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("make", [TopK, ThresholdTopK, Warmup, Constant, Dense])
def test_unknown_options_are_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="densty"):
        make(densty=0.1)


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        TopK(0.1).density = 0.2  # type: ignore[misc]


def test_a_warmup_holds_each_stage_and_then_the_final_density() -> None:
    warmup = Warmup((0.25, 0.063), steps_per_stage=3, final=0.001)
    assert [warmup(s) for s in range(8)] == [0.25] * 3 + [0.063] * 3 + [0.001] * 2
    assert TopK(warmup).density_at(4) == 0.063
    assert Warmup((), 1, 0.5)(0) == 0.5


def test_a_callable_is_asked_at_every_step_and_its_answer_checked() -> None:
    assert density_at(lambda step: 1 / (step + 1), 3) == 0.25
    with pytest.raises(ConfigError, match=r"density\(7\).*1\.5"):
        TopK(lambda step: 1.5).density_at(7)


@given(st.integers(0, 2**32), st.floats(1e-9, 1.0))
def test_k_is_the_rounded_share_and_at_least_one(numel: int, density: float) -> None:
    k = TopK(density).k_for(numel, 0)
    assert k == (min(numel, max(1, round(density * numel))) if numel else 0)
    assert TopK(density).capacity(k, numel) >= k
    assert k <= ThresholdTopK(density).capacity(k, numel) <= numel


def test_dense_sends_everything() -> None:
    dense = Dense()
    assert dense.is_dense
    assert dense.k_for(123, 5) == 123
    assert not TopK(1.0).is_dense


def test_densities_of_other_number_types_are_refused_or_taken_whole() -> None:
    with pytest.raises(ConfigError):
        TopK(torch.tensor(0.1, dtype=torch.float32))  # type: ignore[arg-type]
    assert isinstance(TopK(1).density, float)


def test_a_geometric_density_falls_by_the_same_factor_every_step_and_stays() -> None:
    falling = Geometric(start=0.25, final=0.001, steps=10)
    values = [falling(s) for s in range(14)]
    assert values[0] == 0.25
    assert values[10:] == [0.001] * 4
    ratios = [b / a for a, b in pairwise(values[:11])]
    assert all(math.isclose(r, ratios[0]) for r in ratios)
    assert Geometric(0.5, 0.1, 0)(0) == 0.1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0.0, 0.1, 5), "start"), ((0.5, 2.0, 5), "final"), ((0.5, 0.1, -1), "steps"), ((0.5, 0.1, True), "steps")],
)
def test_a_geometric_density_that_makes_no_sense_is_refused(arguments: tuple[float, float, int], named: str) -> None:
    with pytest.raises(ConfigError, match=f"Geometric.{named}"):
        Geometric(*arguments)
