"""`bench collectives` on real ranks: all algorithms average the same gradients, also one that a test registers."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import mpirun_command, run_job

from sparsecomm.errors import ConfigError
from sparsecomm.exchange.method import methods
from sparsecomm.tools.benches import collectives

EXTRA = """
import sys
import torch.distributed as dist
from sparsecomm.tools.benches.algorithms import Ready, algorithm
from sparsecomm.tools.cli import main

@algorithm("half", role="ours", sparse=False)
def half(case):
    def call():
        dist.all_reduce(case.work)
        case.work.mul_(0.5 / case.world.size)
    return Ready(call, lambda: 7)

sys.argv = ["sparsecomm", *sys.argv[1:]]
main()
"""
SHORT = ("bench", "collectives", "--repeats", "2")


def rows_of(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return found


def test_all_algorithms_average_the_same_gradients(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--numels", "1001,20000", "--density", "0.05", "--json", str(file), "--plot", str(tmp_path / "plots"))
    done = run_job([*mpirun_command(2), sys.executable, "-c", EXTRA, *SHORT, *options], deadline=120)
    assert done.code == 0, done
    result = json.loads(file.read_text())
    assert result["meta"]["command"].startswith("mpirun -n 2 sparsecomm bench collectives --numels 1001,20000")
    rows = [row for row in result["rows"] if row["numel"]]
    names = {"dense sum", "mpi allreduce", "gloo allreduce", "gloo allgather", "compute only", "half", *methods()}
    assert {(row["algorithm"], row["numel"]) for row in rows} == {(a, n) for a in names for n in (1001, 20000)}
    assert not any(row.get("error") for row in rows)
    for numel in (1001, 20000):
        mine = {row["algorithm"]: row for row in rows if row["numel"] == numel}
        for exact in ("dense", "dense sum", "mpi allreduce", "gloo allreduce"):
            assert mine[exact]["relative_error"] < 1e-6
        # Gloo gathers the same payloads, so the error is the same; half an average has an error of one half.
        ours, gloo = mine["allgather"]["relative_error"], mine["gloo allgather"]["relative_error"]
        assert 0.5 < ours < 1.0
        assert ours == pytest.approx(gloo, rel=1e-6)
        assert mine["half"]["relative_error"] == pytest.approx(0.5)
        assert mine["dense"]["bytes_sent"] == pytest.approx(mine["mpi allreduce"]["bytes_sent"], abs=100)
        assert mine["allgather"]["bytes_sent"] < mine["dense"]["bytes_sent"] / 4
        dense = [mine[a] for a in ("mpi allreduce", "gloo allreduce")]
        best = min(dense, key=lambda row: row["seconds"])
        assert mine["dense"]["best_peer"] == mine["half"]["best_peer"] == best["algorithm"]
        assert best["peer_ratio"] == 1.0
    means = [row for row in result["rows"] if row["numel"] is None]
    assert {row["algorithm"] for row in means} == names - {"compute only"}
    for mean in means:
        each = [row["peer_ratio"] for row in rows if row["algorithm"] == mean["algorithm"]]
        assert mean["peer_ratio"] == pytest.approx(math.prod(each) ** (1 / len(each)))
    assert {f.suffix for f in (tmp_path / "plots").iterdir()} == {".png", ".svg"}


def test_without_mpi_its_allreduce_is_a_row_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sparsecomm"]
    done = run_job([*launch, *SHORT, "--numels", "1000", "--density", "0.1", "--json", str(file)], deadline=120)
    assert done.code == 0, done
    rows = {row["algorithm"]: row for row in rows_of(file) if row["numel"]}
    assert "launch with mpirun" in rows["mpi allreduce"]["error"]
    assert rows["dense"]["best_peer"] == "gloo allreduce"


@dataclass
class Ranks:
    """The part of a world that the checks of options read."""

    size: int


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (1, ((10,), (0.1,), None, 2), "a world of 1 has nothing to exchange: mpirun -n 2"),
        (2, ((0,), (0.1,), None, 2), "numel = 0"),
        (2, ((10,), (0.0,), None, 2), "density = 0.0"),
        (2, ((10,), (0.1,), ("rnig",), 2), "'rnig' does not exist; known are allgather, chunked, dense"),
        (2, ((10,), (0.1,), None, 0), "repeats = 0"),
    ],
)
def test_bad_options_are_refused(ranks: int, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        collectives._checked(Ranks(ranks), *arguments)  # type: ignore[arg-type]
