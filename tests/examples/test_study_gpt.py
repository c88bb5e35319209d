"""study_gpt.py end to end, as a user starts it, and its parts in this process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import checkpointing
import gpt_data
import gpt_model
import launching
import pytest
import study_gpt
import torch
import trainer
from task import draw

SCRIPT = launching.HERE / "study_gpt.py"
TINY = ("--size", "tiny", "--batch", "2", "--block", "32", "--eval-every", "5", "--progress", "off")
SPARSE = (*TINY, "--steps", "10", "--density", "0.01", "--warmup-steps", "3", "--collective", "allgather")


def launch(*flags: str | Path, ranks: int) -> subprocess.CompletedProcess[str]:
    """Run the example; ranks 0 means plain python without a launcher."""
    mpirun = launching.find_mpirun()
    if ranks and mpirun is None:
        pytest.skip("no mpirun on this machine")
    launcher = launching.launch_line(mpirun, ranks) if ranks and mpirun else []
    command = [*launcher, sys.executable, str(SCRIPT), *map(str, flags)]
    environment = launching.launch_environment()
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of ten steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    flags = (*SPARSE, "--out", folder / "out", "--log", folder / "log.json", "--plot", folder / "loss.png")
    return folder, launch(*flags, ranks=2)


def test_topk_end_to_end(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = whole
    assert done.returncode == 0, done.stderr
    assert "replicas agree" in done.stdout
    assert done.stdout.count("replicas") == 1, "only rank 0 prints"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "loss.svg").read_text()

    log = read(folder / "log.json")
    meta, rows = log["meta"], log["rows"]
    assert meta["world_size"] == 2
    assert meta["density"] == 0.01
    assert meta["dense_bytes_per_step"] == 4 * meta["parameters"]  # 2 * 4 * n * (P - 1) / P
    assert set(meta["versions"]) == {"python", "torch", "sparsecomm"}
    assert [row["step"] for row in rows] == list(range(11))
    assert all(set(row) == set(rows[0]) for row in rows)
    assert all(math.isfinite(row["train_loss"]) for row in rows[1:])
    assert rows[0]["val_loss"] > rows[-1]["val_loss"] > 1.0
    assert all(a["bytes_sent"] < b["bytes_sent"] for a, b in pairwise(rows))
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(rows))
    assert rows[1]["ratio"] < 15  # a quarter of the gradient
    assert all(row["ratio"] > 100 for row in rows[4:])  # 1%, 16-bit values, headers counted


def test_resumed_run_is_the_uninterrupted_one(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, done = whole
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    flags = (*SPARSE, "--out", out, "--log", tmp_path / "log.json")
    first = launch(*flags, "--stop-after", "5", ranks=2)
    assert first.returncode == 0, first.stderr
    second = launch(*flags, "--resume", ranks=2)
    assert second.returncode == 0, second.stderr
    assert "resumed at step 5" in second.stdout

    for part in ("model.pt", "rank0.pt", "rank1.pt"):
        ours, theirs = (_load(f / "step-00000010" / part) for f in (out, folder / "out"))
        assert_same(ours, theirs, part)
    residuals = [_load(out / "step-00000010" / f"rank{r}.pt")["comm"] for r in (0, 1)]
    tensors = [v for v in residuals[0].values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert any(bool(v.abs().max() > 0) for v in tensors), "the residual was really there"
    assert [p.name for p in out.glob("step-*")] == ["step-00000010"], "older checkpoints are dropped"
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read(path)["rows"]]
        for path in (tmp_path / "log.json", folder / "log.json")
    ]
    assert timeless[0] == timeless[1]


def test_momentum_correction_resumes_exactly(tmp_path: Path) -> None:
    """The velocities travel with the residuals, the optimizer has no momentum, the density falls step by step."""
    small = ("--size", "tiny", "--batch", "1", "--block", "16", "--steps", "8", "--judge", "test", "--progress", "off")
    method = ("--optimizer", "sgd", "--nesterov", "--lr", "0.3", "--feedback", "dgc", "--density", "0.001")
    flags = (*small, *method, "--warmup-kind", "exp", "--warmup-steps", "5", "--collective", "allgather")
    for name, more in (("whole", ()), ("halves", ("--stop-after", "3")), ("halves", ("--resume",))):
        log = tmp_path / f"{name}.json"
        done = launch(*flags, *more, "--out", tmp_path / name, "--log", log, ranks=2)
        assert done.returncode == 0, done.stderr
    for part in ("model.pt", "rank0.pt", "rank1.pt"):
        whole, halves = (_load(tmp_path / name / "step-00000008" / part) for name in ("whole", "halves"))
        assert_same(halves, whole, part)
    assert all(
        group["momentum"] == 0
        for group in _load(tmp_path / "whole/step-00000008/model.pt")["optimizer"]["param_groups"]
    )
    log = read(tmp_path / "whole.json")
    assert log["meta"]["momentum"] == 0.9
    sent = [b["bytes_sent"] - a["bytes_sent"] for a, b in pairwise(log["rows"])]
    assert all(a > 2 * b for a, b in pairwise(sent[:6])), "each warm-up step sends a third of the one before"


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    content.pop("meta", None)  # names folders
    content.pop("rows", None)  # compared without their seconds
    return content


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Equal to the bit, however deep."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def test_resume_refuses_other_settings_and_a_full_folder(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = whole
    assert done.returncode == 0, done.stderr
    other = launch(*SPARSE, "--density", "0.02", "--out", folder / "out", "--resume", ranks=2)
    assert other.returncode == 2
    assert other.stderr.count("study_gpt.py: error") == 1
    assert "cannot resume: density was 0.01" in other.stderr
    assert "is 0.02 now" in other.stderr
    again = launch(*SPARSE, "--out", folder / "out", ranks=0)
    assert again.returncode == 2
    assert "--resume it, or name another --out" in again.stderr
    fewer = launch(*SPARSE, "--out", folder / "out", "--resume", ranks=0)
    assert fewer.returncode == 2
    assert "world_size was 2" in fewer.stderr


def test_text_file_and_plain_python(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    log = tmp_path / "log.json"
    done = launch(*TINY, "--compressor", "dense", "--steps", "3", "--text", text, "--log", log, ranks=0)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1" in done.stdout
    meta = read(log)["meta"]
    assert meta["text"] == str(text)
    assert meta["world_size"] == 1
    assert read(log)["rows"][-1]["val_loss"] < read(log)["rows"][0]["val_loss"]


def test_missing_text_is_said_once_and_ends_the_job(tmp_path: Path) -> None:
    done = launch(*TINY, "--text", tmp_path / "nowhere.txt", ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("study_gpt.py: error") == 1
    assert "cannot read --text" in done.stderr
    assert "nowhere.txt" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--density", "0"], "0 is not in (0, 1]"),
        (["--density", "1.5"], "1.5 is not in (0, 1]"),
        (["--density", "nan"], "nan is not in (0, 1]"),
        (["--density", "much"], "--density"),
        (["--compressor", "zip"], "invalid choice: 'zip'"),
        (["--steps", "0"], "0 is not a positive number"),
        (["--lr", "inf"], "inf is not a positive number"),
        (["--beta1", "1"], "1 is not in [0, 1)"),
        (["--seed", "-1"], "-1 is negative"),
        (["--warmup-densities", ".25,2"], "2 is not in (0, 1]"),
        (["--warmup-steps", "4"], "4 is no multiple of its 3 densities"),
        (["--warmup-steps", "9", "--steps", "6"], "more than --steps 6"),
        (["--warmup-steps", "3", "--compressor", "none"], "no meaning with --compressor none"),
        (["--resume"], "need --out DIR"),
        (["--warmup-steps", "2", "--warmup-kind", "exp", "--density", "0.3"], "below --density 0.3"),
        (["--feedback", "dgc", "--compressor", "none"], "--feedback dgc has no meaning with --compressor none"),
        (["--momentum", "0"], "--momentum has no meaning with --optimizer adamw"),
        (["--nesterov"], "--nesterov has no meaning with --optimizer adamw"),
        (["--optimizer", "sgd", "--beta1", "0.5"], "--beta1 has no meaning with --optimizer sgd"),
        (["--optimizer", "sgd", "--momentum", "0", "--nesterov"], "--nesterov needs a --momentum above 0"),
        (["--weight-decay", "-1"], "-1 is negative"),
        (["--judge", "train"], "invalid choice: 'train'"),
        (["--dens", "0.1"], "unrecognized arguments: --dens"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        study_gpt.parse(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unusable_texts(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(gpt_data.DataError, match=r"too short: 9 training, 0 validation and 0 test bytes.*--block 64"):
        gpt_data.load_corpus(str(short), 64)
    with pytest.raises(gpt_data.DataError, match="cannot read --text"):
        gpt_data.load_corpus(str(tmp_path), 64)


def test_batches_are_a_function_of_seed_rank_and_step() -> None:
    corpus = gpt_data.load_corpus(None, 64)
    task = study_gpt.GPTTask(study_gpt.parse([]), corpus)
    assert len(corpus.train) > 10 * min(len(corpus.val), len(corpus.test)) > 1_000_000

    def batch(seed: int, rank: int, step: int) -> torch.Tensor:
        settings = study_gpt.parse(["--seed", str(seed), "--batch", "4"])
        return draw(task, settings, rank=rank, size=4, step=step)[0]

    assert torch.equal(batch(1, 2, 3), batch(1, 2, 3))
    assert len({batch(*key).numpy().tobytes() for key in [(1, 2, 3), (0, 2, 3), (1, 1, 3), (1, 2, 4)]}) == 4
    inputs, targets = gpt_data.held_out_batches(corpus, "validation", 64)[-1]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize(
    ("size", "low", "high"), [("short", 0.3, 0.4), ("tiny", 0.7, 1.0), ("demo", 3.0, 3.5), ("25m", 25.0, 27.0)]
)
def test_sizes(size: str, low: float, high: float) -> None:
    assert low < trainer.count_parameters(gpt_model.build(size, 64, 0)) / 1e6 < high


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(checkpointing.CheckpointError, match="holds no checkpoint"):
        checkpointing.load(tmp_path, rank=0)
    target = tmp_path / "step-00000001"
    target.mkdir()
    (tmp_path / "latest").write_text(target.name)
    with pytest.raises(checkpointing.CheckpointError, match=r"model\.pt is missing"):
        checkpointing.load(tmp_path, rank=0)
    (target / "model.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(checkpointing.CheckpointError, match=r"model\.pt is damaged"):
        checkpointing.load(tmp_path, rank=0)
