"""`bench backend` on real ranks: every collective of three kinds, in turn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import mpirun_command, run_job

from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import backend

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")


def test_all_collectives_are_compared_with_gloo_and_mpi(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--sizes", "64,5000", "--repeats", "4", "--json", str(file))
    done = run_job([*mpirun_command(2), "sparsecomm", "bench", "backend", *options], deadline=120)
    assert done.code == 0, done
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    found = {(row["collective"], row["dtype"], row["nbytes"]) for row in rows}
    assert found == {(c, d, n) for c in COLLECTIVES for d in ("float32", "bfloat16") for n in (64, 5000, None)}
    for row in rows:
        assert row["over_gloo"] > 0
        is_sum = row["collective"] in ("all_reduce", "reduce_scatter")
        assert (row["over_mpi"] is None) == (is_sum and row["dtype"] == "bfloat16")
        if row["nbytes"] is not None:
            assert (row["goal"] is None) == (row["over_mpi"] is None or row["nbytes"] > 1024)
    assert "geo. mean" in done.out


@dataclass
class Ranks:
    size: int
    transport: str = "mpi"


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (Ranks(1), (("broadcast",), (64,), ("float32",), 4), "a world of 1 over mpi"),
        (Ranks(2, "gloo"), (("broadcast",), (64,), ("float32",), 4), "a world of 2 over gloo"),
        (Ranks(2), (("brodcast",), (64,), ("float32",), 4), "'brodcast' does not exist; known are all_reduce, broad"),
        (Ranks(2), (("broadcast",), (64,), ("int8",), 4), "dtype 'int8' is none of float32, bfloat16"),
        (Ranks(4), (("broadcast",), (15,), ("float32",), 4), "size 15 is less than an element for each of 4 ranks"),
        (Ranks(2), (("broadcast",), (64,), ("float32",), 3), "repeats = 3: 4 at least"),
    ],
)
def test_bad_options_are_refused(ranks: Ranks, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend._check(ranks, *arguments)  # type: ignore[arg-type]
