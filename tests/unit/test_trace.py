"""The timeline file and the stages that fill it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

import sparsecomm as sc
from sparsecomm.runtime import trace
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.runtime.trace import Stage, Timeline, close_timeline, open_timeline


@pytest.fixture(autouse=True)
def no_timeline_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_timeline", None)
    monkeypatch.delenv("SPARSECOMM_TIMELINE", raising=False)


def events(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("given", "written"),
    [("trace.json", "trace.rank3.json"), ("trace", "trace.rank3.json"), ("a.b.json", "a.b.rank3.json")],
)
def test_the_rank_goes_before_the_suffix(tmp_path: Path, given: str, written: str) -> None:
    Timeline(str(tmp_path / given), 3).write()
    assert [p.name for p in tmp_path.iterdir()] == [written]


def test_spans_become_complete_events_on_a_track_a_bucket(tmp_path: Path) -> None:
    timeline = Timeline(str(tmp_path / "t.json"), 1)
    timeline.add("select", 10.0, 10.5, bucket=0, step=4, nnz=7)
    timeline.add("wait", 10.5, 11.5, bucket=2, step=4)
    timeline.write()
    found = events(tmp_path / "t.rank1.json")
    spans = [e for e in found if e["ph"] == "X"]
    assert [(e["name"], e["pid"], e["tid"], round(e["dur"])) for e in spans] == [
        ("select", 1, 0, 500_000),
        ("wait", 1, 2, 1_000_000),
    ]
    assert spans[0]["args"] == {"step": 4, "nnz": 7}
    assert round(spans[1]["ts"] - spans[0]["ts"]) == 500_000
    named = {(e["name"], e.get("tid")): e["args"]["name"] for e in found if e["ph"] == "M"}
    assert named == {("process_name", None): "rank 1", ("thread_name", 0): "bucket 0", ("thread_name", 2): "bucket 2"}


def test_an_empty_timeline_is_a_valid_file(tmp_path: Path) -> None:
    Timeline(str(tmp_path / "t.json"), 0).write()
    assert [e["ph"] for e in events(tmp_path / "t.rank0.json")] == ["M"]


def test_a_long_run_stops_collecting_and_says_how_much_it_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_MOST_EVENTS", 5)
    timeline = Timeline(str(tmp_path / "t.json"), 0)
    for i in range(8):
        timeline.add("wait", i, i + 1, bucket=0, step=i)
    timeline.write()
    document = json.loads((tmp_path / "t.rank0.json").read_text())
    assert sum(e["ph"] == "X" for e in document["traceEvents"]) == 5
    assert document["otherData"] == {"dropped": 3}


def test_threads_may_add_at_the_same_time(tmp_path: Path) -> None:
    timeline = Timeline(str(tmp_path / "t.json"), 0)

    def add(bucket: int) -> None:
        for i in range(200):
            timeline.add("wait", i, i + 1, bucket=bucket, step=i)

    threads = [threading.Thread(target=add, args=(b,)) for b in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    timeline.write()
    assert sum(e["ph"] == "X" for e in events(tmp_path / "t.rank0.json")) == 800


def test_without_the_variable_there_is_no_timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_timeline(0)
    with Stage("select", BucketReport(bucket=0, step=0, numel=1)):
        pass
    close_timeline()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused_at_the_start_not_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSECOMM_TIMELINE", str(tmp_path / "missing" / "t.json"))
    with pytest.raises(sc.SparseCommError, match="SPARSECOMM_TIMELINE"):
        open_timeline(0)


def test_stages_add_their_seconds_also_when_they_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMM_TIMELINE", str(tmp_path / "t.json"))
    open_timeline(0)
    report = BucketReport(bucket=5, step=2, numel=1)
    for name in ("select", "encode", "wait", "apply"):
        with Stage(name, report):
            pass
    first = report.select_seconds
    with pytest.raises(ZeroDivisionError), Stage("select", report):
        _ = 1 // 0
    close_timeline()
    assert report.select_seconds > first > 0
    assert min(report.encode_seconds, report.wait_seconds, report.apply_seconds) > 0
    names = [e["name"] for e in events(tmp_path / "t.rank0.json") if e["ph"] == "X"]
    assert names == ["select", "encode", "wait", "apply", "select"]
    close_timeline()  # twice is once


def test_the_profiler_names_stages(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for profiled in (True, False):
            name = "select" if profiled else "apply"
            with Stage(name, BucketReport(bucket=0, step=0, numel=1), profiled=profiled):
                torch.ones(3, dtype=torch.float32).sum()
    seen = {e.key for e in profiler.key_averages()}
    assert "sparsecomm::select" in seen
    assert "sparsecomm::apply" not in seen
