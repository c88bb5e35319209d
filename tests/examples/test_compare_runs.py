"""The numbers of the demo's table, from logs made up so that they are known."""

from __future__ import annotations

from pathlib import Path

import compare_runs
import pytest
from rich.console import Console
from run_log import LogError, Row, RunLog, plot

N = 1_000_000  # parameters: a dense step of two ranks sends 4 MB from each


def make(compressor: str, sent: list[int], seconds: float, losses: dict[int, float], warmup: int = 0) -> RunLog:
    """A log whose step i sends ``sent[i - 1]`` bytes and takes ``seconds``."""
    meta = {
        "compressor": compressor,
        "density": 0.01,
        "warmup_steps": warmup,
        "world_size": 2,
        "parameters": N,
        "dense_bytes_per_step": 4 * N,
        "bytes_are": "counted",
    }
    rows = [
        Row(
            step=step,
            train_loss=None,
            val_loss=losses.get(step),
            seconds=seconds * step,
            bytes_sent=sum(sent[:step]),
            ratio=None,
        )
        for step in range(len(sent) + 1)
    ]
    return RunLog(meta, rows)


@pytest.fixture
def dense() -> RunLog:
    return make("none", [4 * N] * 10, 0.1, {0: 5.0, 1: 4.0, 2: 3.5, 4: 3.0, 10: 2.0})


@pytest.fixture
def sparse() -> RunLog:
    return make("topk", [N, N] + [N // 25] * 8, 0.2, {0: 5.0, 4: 3.4, 10: 2.2}, warmup=2)


def test_summary(dense: RunLog, sparse: RunLog) -> None:
    ours = compare_runs.summarise(sparse)
    assert ours.label == "top-k 0.01"
    assert ours.val_loss == 2.2
    assert ours.step_seconds == pytest.approx(0.2)
    assert ours.warmup_bytes == N
    assert ours.bytes_per_step == N / 25
    assert ours.total_bytes == 2 * N + 8 * N // 25
    assert ours.ratio == pytest.approx(100)
    theirs = compare_runs.summarise(dense)
    assert theirs.warmup_bytes is None
    assert theirs.ratio == 1.0


def test_equal_steps(dense: RunLog, sparse: RunLog) -> None:
    verdict = compare_runs.at_equal_steps(dense, sparse)
    assert (verdict.at, verdict.dense, verdict.sparse) == ("steps: 10", 2.0, 2.2)
    assert verdict.note == "compressed 10.0% higher"


def test_equal_bytes_gives_dense_the_benefit_of_the_doubt(dense: RunLog, sparse: RunLog) -> None:
    verdict = compare_runs.at_equal_bytes(dense, sparse)  # 2.32 MB: within dense's first step
    assert (verdict.dense, verdict.sparse) == (4.0, 2.2)
    assert verdict.note == "dense at step 1 (4.0 MB), before its first step was over"
    more = make("topk", [N] * 10, 0.2, {10: 2.2})  # 10 MB: dense passes that in step 3, evaluated in step 4
    verdict = compare_runs.at_equal_bytes(dense, more)
    assert verdict.dense == 3.0
    assert verdict.note == "dense at step 4 (16.0 MB)"
    most = make("topk", [5 * N] * 10, 0.2, {10: 2.2})
    assert "never as many" in compare_runs.at_equal_bytes(dense, most).note


def test_equal_time_interpolates(dense: RunLog, sparse: RunLog) -> None:
    verdict = compare_runs.at_equal_time(dense, sparse)  # dense ends after 1 s, in the compressed run's step 5
    assert verdict.at == "time: 1.0 s"
    assert verdict.dense == 2.0
    assert verdict.sparse == pytest.approx(3.4 + (2.2 - 3.4) / 6)
    assert "takes 2.00x" in verdict.note


def test_table_plot_and_command_line(dense: RunLog, sparse: RunLog, tmp_path: Path) -> None:
    dense.write(tmp_path / "dense.json")
    sparse.write(tmp_path / "sparse.json")
    assert RunLog.read(tmp_path / "sparse.json").rows == sparse.rows
    console = Console(width=80, record=True, file=(tmp_path / "table.txt").open("w"))
    compare_runs.show(dense, sparse, console)
    console.file.close()
    text = (tmp_path / "table.txt").read_text()
    for piece in ("100.0x", "40,000", "4,000,000", "2,320,000", "2.2000", "10.0% higher"):
        assert piece in text
    names = [str(tmp_path / name) for name in ("dense.json", "sparse.json")]
    assert compare_runs.main([*names, "--plot", str(tmp_path / "sub" / "c.png")]) == 0
    assert (tmp_path / "sub" / "c.png").stat().st_size > 10_000
    assert (tmp_path / "sub" / "c.svg").exists()


def test_plot_of_one_run(sparse: RunLog, tmp_path: Path) -> None:
    png, svg = plot([sparse], tmp_path / "one.png")
    assert png.exists()
    assert svg.exists()


def test_bad_logs(dense: RunLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.json"
    assert compare_runs.main([str(missing), str(missing)]) == 2
    assert "cannot read the log" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"rows": [{}]}')
    with pytest.raises(LogError, match=r"bad\.json is not a log"):
        RunLog.read(tmp_path / "bad.json")
    with pytest.raises(LogError, match="no evaluated step"):
        compare_runs.summarise(RunLog(dense.meta, dense.rows[:1]))
