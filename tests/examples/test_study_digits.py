"""study_digits.py end to end, and its data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import launching
import pytest
import study_digits
import torch
import trainer
from helpers import mpirun_command, run_job

SCRIPT = launching.HERE / "study_digits.py"
NEEDS = "needs scikit-learn: pip install 'sparsecomm[demo]'"


def test_learns_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason=NEEDS)
    log = tmp_path / "log.json"
    flags = ("--steps", "80", "--lr", "5e-3", "--density", "0.1", "--judge", "test", "--log", log, "--progress", "off")
    job = run_job([*mpirun_command(2), sys.executable, SCRIPT, *flags], deadline=120)
    assert job.code == 0, job
    assert "replicas agree" in job.out
    document = json.loads(log.read_text())
    first, last = document["rows"][0], document["rows"][-1]
    assert first["val_accuracy"] < 0.3
    assert last["val_accuracy"] > 0.7
    assert last["val_accuracy"] * 500 == pytest.approx(round(last["val_accuracy"] * 500)), (
        "every test image counts once"
    )
    assert document["meta"]["judge"] == "test"
    assert document["meta"]["loss_unit"] == "nats per image"


def test_split_is_fixed_and_disjoint() -> None:
    pytest.importorskip("sklearn", reason=NEEDS)
    digits = study_digits.load_digits()
    assert digits.digest == study_digits.load_digits().digest
    assert {name: len(images) for name, images in digits.images.items()} == study_digits.SPLIT
    assert sum(study_digits.SPLIT.values()) == 1797
    for classes in digits.classes.values():
        assert set(classes.tolist()) == set(range(10))
    everything = torch.cat(list(digits.images.values()))
    assert 0.0 == everything.min() < everything.max() == 1.0
    assert len(everything.flatten(1).unique(dim=0)) == 1797, "no image is in two parts"


def test_size() -> None:
    assert trainer.count_parameters(study_digits.CNN()) == 85_066


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as stopped:
        study_digits.main(["--steps", "1"])
    assert stopped.value.code == 2
    assert "pip install 'sparsecomm[demo]'" in capsys.readouterr().err
