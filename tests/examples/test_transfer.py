"""The study of five tasks: its cells, its numbers from logs made up to be known, and a short form of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import convergence
import launching
import numpy as np
import pytest
import study_gpt
import study_lstm
import text_task
import torch
import trainer
import transfer_cells
import transfer_report
from convergence_study import MODELS, Cell, Conditions, StudyError, check_data, load_study, make_run
from gpt_model import build
from helpers import mpirun_command, run_job
from run_log import Row, RunLog
from task import Batch, Indices, draw

SMALL = {"global_batch": 4, "block": 16, "held_out": 1, "lr": 1e-2}
SHORT = f"""
from convergence_study import Cell
SAME = dict(model="lstm", optimizer="adamw", settings={SMALL}, seeds=(0, 1))
CELLS = [
    Cell(method="dense", ranks=1, **SAME),
    Cell(method="topk", density=0.01, ranks=2, **SAME),
]
"""


def test_the_study_is_whole() -> None:
    cells = load_study(launching.HERE / "transfer_cells.py")
    assert cells == transfer_cells.CELLS
    assert {c.model for c in cells} == {"code", "prose", "cnn", "lstm", "tied"}
    for task, optimizer in transfer_cells.RATES:
        for steps in (800, 3000, 10000):
            mine = [c for c in cells if (c.model, c.optimizer, c.steps) == (task, optimizer, steps)]
            dense = [c for c in mine if c.method == "dense"]
            assert len(dense) == 1
            for cell in mine:
                of_messages = {"collective", "value_codec", "warmup_kind", "warmup_steps"}
                of_the_optimizer = {k: v for k, v in cell.settings.items() if k not in of_messages}
                assert of_the_optimizer == dense[0].settings, "no method has settings of its own"
                assert cell.total_steps == steps
                assert len(cell.seeds) == 3
            for method in transfer_cells.METHODS[optimizer]:
                found = {(c.density, c.ranks) for c in mine if c.method == method}
                assert found == {(d, p) for d in (0.01, 0.001) for p in (2, 4, 8, 16)}


def test_every_number_of_ranks_divides_the_global_batch(tmp_path: Path) -> None:
    for cell in transfer_cells.CELLS:
        run = make_run(cell, tmp_path, Conditions(judge="test", ranks=3), seed=0)
        assert run.ranks == cell.ranks
        assert run.flags["global_batch"] % run.ranks == 0
        assert run.flags["global_batch"] == MODELS[cell.model].flags["global_batch"]


class Numbers:
    """A task whose batch is the numbers of its examples."""

    examples = 1000

    def batch(self, chosen: Indices) -> Batch:
        return torch.from_numpy(chosen), torch.from_numpy(chosen)


def test_ranks_share_out_one_draw() -> None:
    settings = study_lstm.parse(["--global-batch", "8", "--seed", "5"])
    task: Any = Numbers()

    def step(size: int, number: int = 7) -> list[int]:
        parts = [draw(task, settings, rank=r, size=size, step=number)[0] for r in range(size)]
        assert {len(part) for part in parts} == {8 // size}
        return [int(n) for part in parts for n in part]

    assert step(1) == step(2) == step(4) == step(8)
    assert step(1) != step(1, 8)
    alone = study_lstm.parse(["--batch", "4"])
    a, b = (draw(task, alone, rank=r, size=2, step=7)[0] for r in (0, 1))
    assert not torch.equal(a, b)
    assert np.array_equal(a, np.random.default_rng([0, 0, 7]).integers(0, 1000, size=4)), "as it always was"


@pytest.mark.parametrize("size", [2, 16])
def test_dense_does_not_depend_on_the_number_of_ranks(size: int) -> None:
    settings = study_lstm.parse(["--global-batch", "16", "--block", "8"])
    task = study_lstm.LSTMTask(settings, text_task.load(settings), "LSTM")

    def gradient(size: int) -> torch.Tensor:
        model = task.build()
        for rank in range(size):
            (model(*draw(task, settings, rank=rank, size=size, step=3)) / size).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.allclose(gradient(size), gradient(1), rtol=1e-4, atol=1e-7)


def test_sizes() -> None:
    assert trainer.count_parameters(study_lstm.LSTM()) == 263_936
    model = build("short", 64, 0)
    assert trainer.count_parameters(model) == 337_456
    assert model.head.weight is model.tokens.weight
    assert isinstance(model.norm, torch.nn.RMSNorm)


def test_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mpirun_command(2)  # skips where there is none
    study = tmp_path / "study.py"
    study.write_text(SHORT)
    out = tmp_path / "out"
    flags = ["--study", str(study), "--out", str(out), "--steps", "16", "--only", "lstm-adamw-dense", "*-p2"]
    assert convergence.main([*flags, "--jobs", "2", "--seeds", "1"]) == 0
    assert "2 runs, 0 finished before" in capsys.readouterr().out
    assert convergence.main([*flags, "--seeds", "1"]) == 0
    assert "2 runs, 2 finished before" in capsys.readouterr().out
    assert convergence.main([*flags, "--gaps"]) == 0
    document = json.loads((out / "gaps.json").read_text())
    (row,) = document["rows"]
    assert (row["ranks"], row["seeds"], row["missing"]) == (2, [0], [1])
    assert row["ratio"] > 20
    assert row["jump"] > 0
    assert document["meta"]["missing"] == ["lstm-adamw-dense-p1 seed 1", "lstm-adamw-topk-0.01-p2 seed 1"]
    assert "| top-k 1% | adamw | 1 |" in (out / "gaps.md").read_text()
    logs = [RunLog.read(path) for path in out.glob("runs/*/seed-0.json")]
    assert sorted(log.meta["world_size"] for log in logs) == [1, 2]
    one, two = (log.rows[1].train_loss for log in logs)
    assert one == pytest.approx(two, rel=1e-5), "the mean over the ranks is the loss of the same examples"


def test_a_batch_that_cannot_be_shared_out() -> None:
    script = launching.HERE / "study_lstm.py"
    job = run_job([*mpirun_command(2), sys.executable, script, "--global-batch", "3"], deadline=120)
    assert job.code == 2, job
    assert job.err.count("--global-batch 3 cannot be shared out evenly to 2 ranks") == 1


def test_missing_data_are_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_data([Cell(model="code", optimizer="sgd", method="dense")])
    with pytest.raises(StudyError, match=r"prose needs runs/data/kjv\.txt.*run `python bench/convergence/study_data"):
        check_data([Cell(model="prose", optimizer="sgd", method="dense")])


def log(final: float, losses: list[float], *, ranks: int = 2, sent: int = 100) -> RunLog:
    """A run of known losses, every step of which sends ``sent`` bytes; dense would send 4,000."""
    settings = vars(study_gpt.parse(["--steps", str(len(losses))]))
    meta = settings | {"world_size": ranks, "dense_bytes_per_step": 4000}
    rows = [
        Row(
            step=i,
            train_loss=losses[i - 1] if i else None,
            val_loss=final if i == len(losses) else None,
            seconds=i,
            bytes_sent=sent * i,
            ratio=None,
        )
        for i in range(len(losses) + 1)
    ]
    return RunLog(meta, rows)


def test_jumps_are_found() -> None:
    falling = [4.0 - 0.1 * i for i in range(30)]
    assert transfer_report.jump(log(1.0, falling)) < 1.0
    assert transfer_report.jump(log(1.0, [2.0] * 12 + [6.0] + [2.0] * 12)) == pytest.approx(3.0)
    assert transfer_report.jump(log(1.0, [9.0] + [2.0] * 20)) == pytest.approx(1.0), "the start is no jump"
    lucky = [2.0] * 12 + [0.2] + [2.0] * 12
    assert transfer_report.jump(log(1.0, lucky)) < 1.2, "one lucky batch makes no jump"
    assert transfer_report.jump(log(1.0, [2.0] * 5)) == 0.0


@pytest.mark.parametrize(
    ("density", "steps", "allowed"),
    [(0.01, 800, 0.03), (0.01, 3000, 0.01), (0.01, 10000, 0.01), (0.001, 800, 0.06), (0.001, 3000, 0.02)],
)
def test_goals(density: float, steps: int, allowed: float) -> None:
    assert transfer_report.goal(density, steps) == pytest.approx(allowed)


def test_gaps_and_their_summary() -> None:
    def cell(method: str, density: float | None, ranks: int, steps: int = 3000) -> Cell:
        return Cell(model="code", optimizer="adamw", method=method, density=density, ranks=ranks, steps=steps)

    flat = [2.0] * 3000
    dense = cell("dense", None, 1)
    good, bad = cell("topk", 0.01, 2), cell("topk", 0.01, 8)
    lonely = cell("topk", 0.01, 2, steps=800)
    logs = {
        dense.name: {0: log(2.0, flat), 1: log(4.0, flat)},
        good.name: {0: log(2.01, flat), 1: log(4.02, flat), 2: log(9.0, flat)},
        bad.name: {1: log(4.2, [2.0] * 2000 + [5.0] * 1000, ranks=8)},
        lonely.name: {0: log(3.0, flat[:800])},
    }
    found = transfer_report.all_gaps([dense, good, bad, lonely], logs, [dense])
    assert [gap.cell for gap in found] == [good.name, bad.name], "dense of the same length is needed"
    first, second = found
    assert first.gap == pytest.approx(0.005)
    assert (first.seeds, first.missing, first.misses) == ([0, 1], [2], False)
    assert first.ratio == pytest.approx(40.0)
    assert (second.ranks, second.misses, second.above_limit) == (8, True, True)
    assert second.gap == pytest.approx(0.05)
    assert (second.jump, second.dense_jump) == (pytest.approx(2.5), pytest.approx(1.0))
    (row,) = transfer_report.summary(found)
    assert row == ["top-k 1%", "adamw", "2", "+2.75%", "+5.00%", bad.name, "1", "1", "2.50"]
    text = transfer_report.markdown(found, ["a seed 0"])
    assert f"Beyond the goal: {bad.name} (+5.00%)." in text
    assert "Missing runs: 1 (a seed 0)." in text
