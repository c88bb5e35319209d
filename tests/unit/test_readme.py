"""`make readme`: every row of a result of `bench peers` is in the table, also if it lost or failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, job_environment

META = {
    "bench": "peers",
    "command": "sparsecomm bench peers",
    "cpu": "a cpu",
    "cores": 2,
    "hosts": 4,
    "task": "mlp",
    "numel": 25_198_602,
    "loss_steps": 20,
    "fastest": "1gbit",
    "date": "2026-01-01",
}


def row(method: str, rate: str, step: float, *, density: float | None = None, error: str = "") -> dict[str, Any]:
    figures = {
        "step_seconds": step,
        "exposed_seconds": step - 0.3,
        "bytes_per_step": 1000,
        "final_loss": 2.0,
        "steps": 8,
        "curve": [[1, 1000, 2.3], [8, 8000, 2.0]],
    }
    return {"method": method, "rate": rate, "density": density, "error": error or None, **({} if error else figures)}


ROWS = [
    row("none", "1gbit", 0.3),
    row("ddp-gloo", "1gbit", 1.6),
    row("slowest", "1gbit", 4.0),
    row("broken", "1gbit", 0.0, error="it does not run on CPUs"),
    row("sparsecomm-topk", "1gbit", 0.5, density=0.001),
]


def write(folder: Path, meta: dict[str, Any], readme: str) -> tuple[Path, Path]:
    result, page = folder / "some_peers.json", folder / "README.md"
    result.write_text(json.dumps({"meta": meta, "rows": ROWS}))
    page.write_text(readme)
    return result, page


def run(result: Path, page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "readme.py"), str(result), "--readme", str(page)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=job_environment())


MARKED = "before\n<!-- peers: written by bench/readme.py -->\nold\n<!-- /peers -->\nafter\n"


def test_every_run_is_in_the_table_and_the_rest_of_the_readme_stays(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result, page = write(tmp_path, META, MARKED)
    done = run(result, page)
    assert done.returncode == 0, done
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /peers -->\nafter\n")
    assert "old" not in text
    assert "| plain DDP over Gloo, fp32 | 1600 (1300) | 1,000 | 2.000 |" in text
    assert "| slowest | 4000 (3700) |" in text
    assert "| sparsecomm-topk, 0.1% | **500 (200)** |" in text
    assert "| broken | failed |" in text
    assert "broken: it does not run on CPUs" in text
    assert "(some_peers_exposed.png)" in text
    assert (tmp_path / "some_peers_exposed.png").exists()
    assert run(result, page).returncode == 0
    assert page.read_text() == text, "twice is once"


@pytest.mark.parametrize(
    ("meta", "readme", "named"),
    [({**META, "bench": "wire"}, MARKED, "not peers"), (META, "no markers", "needs the markers")],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, meta: dict[str, Any], readme: str, named: str) -> None:
    result, page = write(tmp_path, meta, readme)
    done = run(result, page)
    assert done.returncode == 2, done
    assert named in done.stderr
    assert page.read_text() == readme
