"""Residuals belong to parameter names: they survive any re-bucketing, saving and loading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.errors import StateError
from sparsecomm.feedback import BucketLayout, ResidualStore

SHAPES = {"a": (3,), "b": (2, 2), "c": (), "d": (1, 4), "e": (0,), "f": (5,)}


def bucket_of(*names: str) -> BucketLayout:
    return BucketLayout.of([(n, torch.empty(SHAPES[n], dtype=torch.float32)) for n in names])


def expected_in_order(values: dict[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([values[n].reshape(-1) for n in names])


partitions = st.permutations(sorted(SHAPES)).flatmap(
    lambda order: st.lists(st.integers(1, 3), min_size=6, max_size=6).map(
        lambda sizes: [
            tuple(order[sum(sizes[:i]) : sum(sizes[: i + 1])])
            for i in range(6)
            if order[sum(sizes[:i]) : sum(sizes[: i + 1])]
        ]
    )
)


@given(st.lists(partitions, min_size=1, max_size=6))
def test_values_follow_their_names_through_rebuilds(rebuilds: list[list[tuple[str, ...]]]) -> None:
    store = ResidualStore()
    values = {n: torch.zeros(s, dtype=torch.float32) for n, s in SHAPES.items()}
    counter = 1.0
    for buckets in rebuilds:
        for names in buckets:
            flat = store.bucket(bucket_of(*names))
            assert torch.equal(flat, expected_in_order(values, names))
            flat += counter
            counter += 1
            offset = 0
            for n in names:
                values[n] = flat[offset : offset + values[n].numel()].view(SHAPES[n]).clone()
                offset += values[n].numel()
    saved = store.state()
    assert all(torch.equal(saved[n], values[n]) for n in saved)


@given(st.lists(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=4, unique=True), max_size=8))
def test_values_follow_their_names_through_overlapping_buckets(sequence: list[list[str]]) -> None:
    """A rebuild that was interrupted half-way leaves some names in old buckets and others in new ones."""
    store = ResidualStore()
    values = {n: torch.zeros(s, dtype=torch.float32) for n, s in SHAPES.items()}
    for step, names in enumerate(sequence):
        flat = store.bucket(bucket_of(*names))
        assert torch.equal(flat, expected_in_order(values, tuple(names)))
        flat += step + 1.0
        for n in names:
            values[n] = values[n] + step + 1.0
    assert all(torch.equal(t, values[n]) for n, t in store.state().items())


def test_an_unchanged_bucket_gives_the_same_memory() -> None:
    store = ResidualStore()
    first = store.bucket(bucket_of("a", "b"))
    assert store.bucket(bucket_of("a", "b")) is first


def test_a_rebuild_frees_the_old_memory() -> None:
    store = ResidualStore()
    store.bucket(bucket_of("a", "b"))
    store.bucket(bucket_of("b", "a"))
    store.bucket(bucket_of("a"))
    store.bucket(bucket_of("b"))
    assert len(store._flat) == 2


def test_has_and_names_know_what_is_there_and_what_was_loaded() -> None:
    store = ResidualStore()
    assert not store.has(bucket_of("a"))
    store.bucket(bucket_of("a", "b"))
    store.load({"d": torch.ones(1, 4, dtype=torch.float32)})
    assert store.names() == {"a", "b", "d"}
    assert store.has(bucket_of("c", "d"))
    assert not store.has(bucket_of("c"))


def test_channels_last_parameters_keep_memory_order_in_the_bucket_and_shape_order_in_the_checkpoint() -> None:
    weight = torch.arange(2.0 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    layout = BucketLayout.of(
        [
            ("first", torch.empty(2, dtype=torch.float32)),
            ("conv", weight),
            ("last", torch.empty(3, dtype=torch.float32)),
        ]
    )
    in_memory_order = weight.permute(0, 2, 3, 1).reshape(-1)
    store = ResidualStore()
    flat = store.bucket(layout)
    flat[2:122] = in_memory_order
    assert torch.equal(store.state()["conv"], weight)
    other = ResidualStore()
    other.load(store.state())
    assert torch.equal(other.bucket(layout), flat)


def test_a_checkpoint_moves_between_memory_formats() -> None:
    """What was saved from a channels-last model may be loaded into a contiguous one."""
    weight = torch.randn(2, 3, 4, 4, dtype=torch.float32)
    last = BucketLayout.of([("w", weight.to(memory_format=torch.channels_last))])
    store, other = ResidualStore(), ResidualStore()
    store.bucket(last).copy_(weight.permute(0, 2, 3, 1).reshape(-1))
    other.load(store.state())
    assert torch.equal(other.bucket(BucketLayout.of([("w", weight)])), weight.reshape(-1))


def test_a_change_of_memory_format_alone_reorders_the_residual() -> None:
    weight = torch.randn(2, 3, 4, 4, dtype=torch.float32)
    store = ResidualStore()
    store.bucket(BucketLayout.of([("w", weight)])).copy_(weight.reshape(-1))
    moved = store.bucket(BucketLayout.of([("w", weight.to(memory_format=torch.channels_last))]))
    assert torch.equal(moved, weight.permute(0, 2, 3, 1).reshape(-1))


def test_overlapping_and_expanded_parameters_are_laid_out_contiguously() -> None:
    expanded = torch.arange(3.0, dtype=torch.float32).expand(2, 3)
    layout = BucketLayout.of([("x", expanded)])
    assert layout.strides == (None,)
    store = ResidualStore()
    store.bucket(layout).copy_(torch.arange(6.0, dtype=torch.float32))
    assert torch.equal(store.state()["x"], torch.arange(6.0, dtype=torch.float32).view(2, 3))


def test_hashes_tell_names_shapes_order_and_memory_order_apart() -> None:
    hashes = {bucket_of(*names).hash for names in (("a", "b"), ("b", "a"), ("a",), ("b",), ("d",))}
    assert len(hashes) == 5
    image = torch.empty(2, 3, 4, 4, dtype=torch.float32)
    a = BucketLayout.of([("w", image)])
    b = BucketLayout.of([("w", image.to(memory_format=torch.channels_last))])
    assert a.hash != b.hash, "the same bucket position is another element"
    thin = torch.empty(2, 3, 1, 1, dtype=torch.float32)
    formats = [
        BucketLayout.of([("w", thin.to(memory_format=f))]) for f in (torch.contiguous_format, torch.channels_last)
    ]
    assert formats[0].hash == formats[1].hash, "dimensions of length 1 have no order"
    assert a.numel == 96
    assert a.hash < 2**64


def test_saved_values_are_copies() -> None:
    store = ResidualStore()
    flat = store.bucket(bucket_of("a"))
    saved = store.state()
    flat += 1
    assert bool((saved["a"] == 0).all())
    store.load({"a": (loaded := torch.ones(3, dtype=torch.float32))})
    loaded += 5
    assert bool((store.bucket(bucket_of("a")) == 1).all())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"a": torch.ones(4, dtype=torch.float32)}, ["'a'", "(4,)", "(3,)"]),
        ({"a": torch.ones(3, dtype=torch.float64)}, ["'a'", "float64"]),
        ({"a": torch.ones(3, dtype=torch.int32)}, ["'a'", "int32"]),
        ({"a": torch.tensor([1.0, float("nan"), 0.0], dtype=torch.float32)}, ["'a'", "non-finite"]),
        ({"a": [1.0, 2.0, 3.0]}, ["'a'", "list"]),
        ({"b": torch.ones(2, 2, dtype=torch.float32), "a": torch.ones(1, 3, dtype=torch.float32)}, ["'a'", "(1, 3)"]),
        (
            {"b": torch.ones(2, 2, dtype=torch.float32), "unseen": torch.full((2,), float("inf"), dtype=torch.float32)},
            ["'unseen'", "non-finite"],
        ),
    ],
)
def test_a_bad_checkpoint_is_refused_by_name_and_changes_nothing(
    bad: dict[str, torch.Tensor], words: list[str]
) -> None:
    store = ResidualStore()
    flat = store.bucket(bucket_of("a", "b"))
    flat.copy_(torch.arange(7.0, dtype=torch.float32))
    with pytest.raises(StateError) as caught:
        store.load(bad)
    assert all(w in str(caught.value) for w in words), str(caught.value)
    assert torch.equal(flat, torch.arange(7.0, dtype=torch.float32))
    assert store.names() == {"a", "b"}


def test_a_loaded_shape_that_does_not_fit_is_refused_when_the_bucket_comes_and_changes_nothing() -> None:
    store = ResidualStore()
    store.load({"a": torch.ones(3, dtype=torch.float32), "b": torch.ones(4, dtype=torch.float32)})
    with pytest.raises(StateError, match=r"'b'.*\(4,\).*\(2, 2\)"):
        store.bucket(bucket_of("a", "b"))
    assert store.names() == {"a", "b"}
    assert torch.equal(store.bucket(bucket_of("a")), torch.ones(3, dtype=torch.float32))


def test_loading_replaces_everything_also_in_live_buckets() -> None:
    store = ResidualStore()
    flat = store.bucket(bucket_of("a", "f"))
    flat += 9
    store.load({"f": torch.ones(5, dtype=torch.float32)})
    assert flat.tolist() == [0.0] * 3 + [1.0] * 5
    assert store.bucket(bucket_of("a", "f")) is flat
