"""Torch's own hooks in the study's trainer: their bytes, and PowerSGD's memory in a checkpoint."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import launching
import pytest
import study_gpt
import torch
from helpers import mpirun_command, run_job

SCRIPT = launching.HERE / "study_gpt.py"
FLAGS = (
    "--size",
    "micro",
    "--batch",
    "2",
    "--block",
    "16",
    "--eval-every",
    "4",
    "--held-out",
    "1",
    "--progress",
    "off",
)
STEPS = ("--steps", "8", "--skip-early-evals")


def train(compressor: str, log: Path, *flags: str | Path) -> tuple[dict[str, Any], str]:
    """Trains on two ranks; returns the log and the output."""
    line = [*mpirun_command(2), sys.executable, SCRIPT, *FLAGS, *STEPS, "--compressor", compressor, "--log", log]
    job = run_job([*line, *flags], deadline=150)
    assert job.code == 0, job
    return json.loads(log.read_text()), job.out


def sent(log: dict[str, Any]) -> list[int]:
    """The bytes of each step."""
    total = [row["bytes_sent"] for row in log["rows"]]
    return [b - a for a, b in pairwise(total)]


@pytest.mark.parametrize(("compressor", "part"), [("fp16", 2), ("silent", None)])
def test_hooks_train_and_say_their_bytes(compressor: str, part: int | None, tmp_path: Path) -> None:
    log, said = train(compressor, tmp_path / "log.json")
    dense = log["meta"]["dense_bytes_per_step"]
    assert sent(log) == [dense // part if part else 0] * 8
    assert log["meta"]["bytes_are"].startswith("computed")
    assert log["rows"][-1]["val_loss"] < log["rows"][0]["val_loss"]
    assert ("replicas agree" in said) == (compressor != "silent"), "a silent hook leaves each rank its own gradients"


def test_powersgd_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first = ("--warmup-steps", "3", "--out")
    whole, said = train("powersgd-r1", tmp_path / "whole.json", *first, tmp_path / "whole")
    assert "replicas agree" in said
    dense = whole["meta"]["dense_bytes_per_step"]
    assert sent(whole)[:3] == [dense] * 3, "whole gradients in the warm-up"
    assert max(sent(whole)[3:]) < dense / 5
    parts = (*first, tmp_path / "parts")
    train("powersgd-r1", tmp_path / "half.json", *parts, "--stop-after", "6")
    resumed, said = train("powersgd-r1", tmp_path / "resumed.json", *parts, "--resume")
    assert "resumed at step 6" in said
    assert sent(resumed) == sent(whole)
    assert [row["train_loss"] for row in resumed["rows"]] == [row["train_loss"] for row in whole["rows"]]
    assert resumed["rows"][-1]["val_loss"] == whole["rows"][-1]["val_loss"]
    ours, theirs = (torch.load(tmp_path / f / "step-00000008" / "rank1.pt")["comm"] for f in ("parts", "whole"))
    assert ours["iter"] == theirs["iter"] == 8
    assert torch.equal(ours["error_dict"][0], theirs["error_dict"][0])
    assert ours["error_dict"][0].abs().max() > 0


@pytest.mark.parametrize(("compressor", "rank"), [("powersgd-r1", 1), ("powersgd-r4", 4), ("fp16", None)])
def test_the_rank_of_powersgd(compressor: str, rank: int | None) -> None:
    assert study_gpt.parse(["--compressor", compressor]).matrix_rank == rank


def test_a_warm_up_has_no_meaning_with_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study_gpt.parse(["--compressor", "fp16", "--warmup-steps", "2"])
    assert "--warmup-steps has no meaning with --compressor fp16" in capsys.readouterr().err
