"""study_fashion.py end to end on small files made here, and its reader."""

from __future__ import annotations

import gzip
import json
import re
import struct
import sys
from pathlib import Path

import launching
import numpy as np
import pytest
import study_data
import study_fashion
import trainer
from gpt_data import DataError
from helpers import mpirun_command, run_job

SCRIPT = launching.HERE / "study_fashion.py"


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the idx format."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def put(folder: Path, count: int = 120, tests: int = 40) -> Path:
    """Pictures whose class is the place of a bright bar."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for part, size in (("train", count), ("t10k", tests)):
        labels = random.integers(0, 10, size=size).astype(np.uint8)
        images = random.integers(0, 60, size=(size, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return folder


def test_learns_pictures_with_a_shared_batch(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    flags = ["--data", put(tmp_path / "data"), "--global-batch", "16", "--steps", "40", "--density", "0.1"]
    flags += ["--judge", "test", "--log", log, "--progress", "off", "--skip-early-evals", "--eval-every", "20"]
    job = run_job([*mpirun_command(2), sys.executable, SCRIPT, *flags], deadline=150)
    assert job.code == 0, job
    assert "replicas agree" in job.out
    assert "2 rank(s) x 8" in job.out
    document = json.loads(log.read_text())
    assert document["rows"][-1]["val_accuracy"] > 2 * document["rows"][0]["val_accuracy"]
    assert [row["step"] for row in document["rows"] if row["val_loss"] is not None] == [0, 20, 40]


def test_split_and_size(tmp_path: Path) -> None:
    data = study_fashion.load_fashion(put(tmp_path / "data"))
    assert {part: len(images) for part, images in data.images.items()} == {"train": 110, "validation": 10, "test": 40}
    assert data.images["train"].shape[1:] == (1, 28, 28)
    assert data.held_out_batch == 10
    assert trainer.count_parameters(study_fashion.NormedCNN()) == 79_770


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot read"),
        (gzip.compress(b"\0\0\x0d\1"), "is no array of bytes"),
        (gzip.compress(b"\0\0"), "is no array of bytes"),
        (gzip.compress(b"\0\0\x08\3\0\0\0\1"), "deny"),
        (gzip.compress(idx(np.zeros(3, np.uint8))[:-1]), r"holds 2 bytes, which its dimensions \[3\] deny"),
    ],
    ids=["text", "kind", "short", "cut", "sizes"],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        study_fashion.read_idx(path)


def test_labels_of_other_images(tmp_path: Path) -> None:
    folder = put(tmp_path / "data")
    (folder / study_data.FASHION_FILES[1]).write_bytes(gzip.compress(idx(np.zeros(3, np.uint8))))
    with pytest.raises(DataError, match="do not match their labels"):
        study_fashion.load_fashion(folder)


def test_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        study_fashion.main(["--steps", "1"])
    assert stopped.value.code == 2
    assert re.search(
        r"train-images.* is missing; run `python bench/convergence/study_data\.py`", capsys.readouterr().err
    )
