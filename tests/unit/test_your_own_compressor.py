"""The code in docs/your-own-compressor.md trains under mpirun and keeps the contract of compressors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT, mpirun_command, run_job

PAGE = ROOT / "docs" / "your-own-compressor.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The script of the page."""
    script = tmp_path / "own.py"
    script.write_text(BLOCKS[0])
    return script


def test_it_trains_and_its_bytes_are_counted(own: Path) -> None:
    job = run_job([*mpirun_command(2), sys.executable, own], deadline=240)
    assert job.code == 0, job
    found = re.findall(r"step (\d+): loss (\d+), ([\d,]+) bytes sent, dense / sent = (\d+)", job.out)
    assert [int(step) for step, *_ in found] == [0, 50, 100], job
    losses, sent = [int(f[1]) for f in found], [int(f[2].replace(",", "")) for f in found]
    assert losses[2] < 0.8 * losses[0]
    # 301 of 30,100 elements: 2 bytes per value, 1 to 2 bytes per index, and a header of 88 bytes.
    assert 301 * 3 < sent[0] < 301 * 4 + 88
    assert sent[2] == pytest.approx(101 * sent[0], rel=0.02)
    assert int(found[2][3]) > 50


def test_the_check_passes(own: Path) -> None:
    check = own.with_name("check.py")
    check.write_text(BLOCKS[1])
    job = run_job([sys.executable, "-W", "error", check], deadline=120)
    assert job.code == 0, job


def test_it_is_short_and_all_code_of_the_page_is_run() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 40
    assert len(BLOCKS) == 2
