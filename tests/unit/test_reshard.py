"""Resharding keeps (sum of residuals) / P for all world sizes, and refuses incomplete worlds."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm.ddp.checkpoint import Checkpoint

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "scale": (), "b.weight": (2, 3, 2)}
Saved = dict[str, torch.Tensor]


def world_of(size: int, seed: int = 0, *, velocity: bool = False, step: int = 5, unit: float = 1.0) -> list[Saved]:
    """What each rank of a world saved."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for rank in range(size):
        made = Checkpoint(step, rank, size)
        made.memories["residual"] = {
            n: torch.randn(s, generator=g, dtype=torch.float32) * unit for n, s in SHAPES.items()
        }
        if velocity:
            made.memories["velocity"] = {
                n: torch.randn(s, generator=g, dtype=torch.float32) * unit for n, s in SHAPES.items()
            }
        out.append(made.to_dict())
    return out


def mean(world: list[Saved], key: str) -> torch.Tensor:
    return torch.stack([d[key].double() for d in world]).sum(0) / len(world)


@given(old=st.integers(1, 9), new=st.integers(1, 9), seed=st.integers(0, 99), unit=st.sampled_from([1e-30, 1.0, 1e20]))
def test_the_sum_over_p_is_kept(old: int, new: int, seed: int, unit: float) -> None:
    world = world_of(old, seed, velocity=True, unit=unit)
    made = sc.reshard(world, new)
    assert [int(d["rank"]) for d in made] == list(range(new))
    assert {int(d["world_size"]) for d in made} == {new}
    assert {int(d["step"]) for d in made} == {5}
    for key in (f"{kind}.{name}" for kind in ("residual", "velocity") for name in SHAPES):
        assert all(d[key].shape == world[0][key].shape and d[key].dtype == torch.float32 for d in made)
        torch.testing.assert_close(mean(made, key), mean(world, key), rtol=1e-5, atol=1e-6 * unit)


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 2), (3, 3), (1, 4), (3, 2)])
def test_there_and_back_keeps_it_too(old: int, new: int) -> None:
    world = world_of(old)
    back = sc.reshard(sc.reshard(world, new), old)
    for name in SHAPES:
        torch.testing.assert_close(mean(back, f"residual.{name}"), mean(world, f"residual.{name}"))


def test_the_same_size_changes_no_bit() -> None:
    world = world_of(3, velocity=True)
    world[1]["selector.00000000000000ff"] = torch.tensor([0.5, 3.0, 7.0], dtype=torch.float64)
    for before, after in zip(world, sc.reshard(world, 3), strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


def test_thresholds_of_another_world_are_dropped() -> None:
    world = world_of(2)
    for d in world:
        d["selector.00000000000000ff"] = torch.tensor([0.5, 3.0, 7.0], dtype=torch.float64)
    assert not any(k.startswith("selector.") for d in sc.reshard(world, 3) for k in d)


def test_what_is_given_is_not_changed() -> None:
    world = world_of(4)
    copies = [{k: t.clone() for k, t in d.items()} for d in world]
    for new in sc.reshard(world, 2):
        for t in new.values():
            if t.is_floating_point():
                t.fill_(9.0)
    for d in sc.reshard(world, 4):
        for t in d.values():
            t.zero_()
    for before, after in zip(copies, world, strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 2), (2, 5), (3, 3)])
def test_parameters_that_only_some_ranks_have_residuals_of(old: int, new: int) -> None:
    """An empty tensor stands for none: frozen, or in dense buckets."""
    for bare in range(2**old - 1):
        world = world_of(old)
        for rank in range(old):
            if bare >> rank & 1:
                world[rank]["residual.a.bias"] = torch.empty(0, dtype=torch.float32)
        full = [
            d["residual.a.bias"] if d["residual.a.bias"].numel() else torch.zeros(3, dtype=torch.float32) for d in world
        ]
        made = sc.reshard(world, new)
        got = [
            d["residual.a.bias"] if d["residual.a.bias"].numel() else torch.zeros(3, dtype=torch.float32) for d in made
        ]
        torch.testing.assert_close(torch.stack(got).sum(0) / new, torch.stack(full).sum(0) / old)


def test_ranks_in_wrong_order_missing_or_twice_are_refused() -> None:
    world = world_of(3)
    for order in [*list(permutations(range(3)))[1:], (0, 1), (0, 0, 1), (0, 1, 2, 2), (2,)]:
        with pytest.raises(sc.StateError, match="rank order"):
            sc.reshard([world[i] for i in order], 2)


def test_no_checkpoints_at_all_are_refused() -> None:
    with pytest.raises(sc.StateError, match="none"):
        sc.reshard([], 2)


@pytest.mark.parametrize("size", [0, -1, 2.0, 1.5, True, "2", None])
def test_world_sizes_that_are_none_are_refused_by_value(size: Any) -> None:
    with pytest.raises((sc.StateError, sc.ConfigError), match=str(size)):
        sc.reshard(world_of(2), size)


def test_checkpoints_of_different_steps_are_refused() -> None:
    a, b = world_of(2)[0], world_of(2, step=6)[1]
    with pytest.raises(sc.StateError, match=r"\[5, 6\]"):
        sc.reshard([a, b], 3)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_checkpoints_of_different_models_are_refused_by_name(new: int) -> None:
    world = world_of(2)
    world[1]["residual.c.weight"] = world[1].pop("residual.a.weight")
    with pytest.raises(sc.StateError, match=r"a\.weight|c\.weight"):
        sc.reshard(world, new)


@pytest.mark.parametrize("new", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 3), (3, 1), (3,)])
def test_checkpoints_of_different_shapes_are_refused_by_name(new: int, shape: tuple[int, ...]) -> None:
    """(3, 1) would broadcast in silence."""
    world = world_of(2)
    world[1]["residual.a.weight"] = torch.ones(shape, dtype=torch.float32)
    with pytest.raises(sc.StateError, match=r"a\.weight"):
        sc.reshard(world, new)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, 4, dtype=torch.float64),
        torch.full((3, 4), torch.nan, dtype=torch.float32),
        "text",
        None,
        torch.zeros(3, 4, dtype=torch.float32).to_sparse(),
    ],
    ids=["float64", "nan", "str", "None", "sparse"],
)
def test_residuals_that_could_not_be_loaded_are_refused_by_name(value: Any) -> None:
    """Better here than by every rank of the new job."""
    world = world_of(2)
    world[1]["residual.a.weight"] = value
    with pytest.raises(sc.StateError, match=r"a\.weight"):
        sc.reshard(world, 1)


def test_velocities_on_some_ranks_only_are_refused_by_name() -> None:
    world = [world_of(2, velocity=True)[0], world_of(2)[1]]
    with pytest.raises(sc.StateError, match="velocit"):
        sc.reshard(world, 1)
