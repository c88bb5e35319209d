"""`sparsecomm bench volume`: its counts agree with those of the collectives, and it can measure every collective."""

from __future__ import annotations

import pytest

from sparsecomm.errors import ConfigError
from sparsecomm.exchange.method import methods
from sparsecomm.tools.benches import registry


def test_every_registered_collective_has_a_volume_and_only_split_reduce_is_the_same_for_more_ranks() -> None:
    rows = registry()["volume"](
        ranks=(2, 8), densities=(0.01,), kinds=("random",), collectives=tuple(methods()), steps=2
    )
    words = {(row["collective"], row["ranks"]): row["words"] for row in rows["rows"]}
    assert set(words) == {(name, size) for name in methods() for size in (2, 8)}
    assert words["split_reduce", 8] < 1.2 * words["split_reduce", 2]
    assert words["allgather", 8] > 2 * words["split_reduce", 8]
    assert words["dense", 8] == pytest.approx(1 / 0.01, rel=0.01), "in 16 bits, as the values of the others"
    assert all(0.9 < row["estimate_ratio"] < 1.1 for row in rows["rows"]), "strategies predict what they send"
    dense = next(row for row in rows["rows"] if row["collective"] == "dense")
    assert dense["dense_ratio"] == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("kind", ["random", "clustered", "adversarial"])
def test_split_reduce_meets_its_goals(kind: str) -> None:
    (row,) = registry()["volume"](ranks=(5,), densities=(0.001,), kinds=(kind,), steps=2)["rows"]
    assert row["ok"] == "ok"
    assert row["words"] <= 3.0
    assert row["balance"] <= 1.2
    assert row["overlap"] > 0.9
    assert 0.6 * row["k"] < row["kept"] < 1.4 * row["k"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kinds": ("odd",)}, "kind = 'odd'"),
        ({"collectives": ("ring",)}, "'ring'"),
        ({"value_codec": "fp8"}, "'fp8'"),
        ({"ranks": (1,)}, "ranks"),
        ({"steps": 0}, "steps = 0"),
        ({"densities": (0.0,)}, "densities"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        registry()["volume"](**{"ranks": (2,), "densities": (0.5,), "steps": 1, "k": 8, **options})
