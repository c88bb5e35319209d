"""Data from Debian packages: what is made of them, from small files made here, and the packages where installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import study_data

LINES = b"Ge1:1 In the beginning God created.\n1Sa1:12 And it came to pass: 3:4 is no label here.\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which data are made, on a system without the packages."""
    monkeypatch.chdir(tmp_path)
    for name in ("BIBLE", "VERSES", "PICTURES"):
        monkeypatch.setattr(study_data, name, Path("nowhere") / getattr(study_data, name))
    return tmp_path


def fake_run(*command: str | Path, cwd: Path | None = None) -> bytes:
    """Downloads an empty package, which unpacks to all that is wanted; the program prints two verses."""
    if command[0] == "apt-get":
        assert cwd is not None
        (cwd / "x.deb").touch()
    elif command[0] == "dpkg-deb":
        root = Path(command[-1])
        for name in (study_data.BIBLE, study_data.VERSES, *(study_data.PICTURES / n for n in study_data.FASHION_FILES)):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.name.encode())
    return LINES


def test_packages_that_are_not_installed_are_fetched_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_data, "run", fake_run)
    assert study_data.main() == 0
    assert capsys.readouterr().out.count("downloading") == 3
    assert study_data.PROSE.read_bytes() == (
        b"In the beginning God created.\nAnd it came to pass: 3:4 is no label here.\n"
    )
    for name in study_data.FASHION_FILES:
        assert (study_data.FASHION / name).read_text() == name
    assert sorted(p.name for p in study_data.FOLDER.iterdir()) == ["fashion-mnist", "kjv.txt"], "nothing else is left"
    assert study_data.main() == 0
    assert "downloading" not in capsys.readouterr().out


def test_a_download_that_fails_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(here))
    assert study_data.main() == 2
    assert "study_data.py: error: cannot run apt-get" in capsys.readouterr().err
    assert list(study_data.FOLDER.iterdir()) == []


def test_the_hint_is_for_its_own_files(here: Path) -> None:
    assert study_data.ADVICE in study_data.hint(study_data.PROSE)
    assert study_data.hint(here / "mine.txt") == ""


def test_the_real_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path("/")
    if not (root / study_data.BIBLE).exists() or not (root / study_data.VERSES).exists():
        pytest.skip("needs Debian's packages bible-kjv and bible-kjv-text")
    monkeypatch.chdir(tmp_path)
    study_data.make_prose(tmp_path)
    lines = study_data.PROSE.read_text().splitlines()
    assert len(lines) == 31102
    assert lines[0] == "In the beginning God created the heaven and the earth."
