"""Counters: sums, ratios, and steps that close when their last bucket is done."""

from __future__ import annotations

from dataclasses import fields

import pytest

from sparsecomm.errors import StateError, WireError
from sparsecomm.runtime.metrics import BucketReport, Metrics, Recorder


def report(step: int, bucket: int, **values: float) -> BucketReport:
    return BucketReport(bucket=bucket, step=step, numel=100, nnz=10, bytes_sent=50, dense_bytes=400, **values)


def test_nothing_exchanged_has_ratio_and_density_one() -> None:
    assert (Metrics().ratio, Metrics().density) == (1.0, 1.0)


def test_reports_add_up() -> None:
    metrics = Metrics()
    for bucket in range(3):
        metrics.add(report(0, bucket, select_seconds=0.5))
    assert (metrics.buckets, metrics.numel, metrics.nnz, metrics.bytes_sent) == (3, 300, 30, 150)
    assert (metrics.ratio, metrics.density, metrics.select_seconds) == (8.0, 0.1, 1.5)
    twice = Metrics()
    twice.merge(metrics), twice.merge(metrics)
    assert all(getattr(twice, f.name) == 2 * getattr(metrics, f.name) for f in fields(Metrics))


def test_every_field_of_a_report_is_summed() -> None:
    kept = {f.name for f in fields(BucketReport)} - {"bucket", "step"}
    assert kept <= {f.name for f in fields(Metrics)}


def test_a_step_closes_when_its_last_bucket_has_finished_in_any_order() -> None:
    recorder = Recorder()
    seen: list[tuple[int, int]] = []
    recorder.callbacks.append(lambda step, metrics: seen.append((step, metrics.buckets)))
    for bucket in range(3):
        recorder.submitted(0, last=bucket == 2)
    recorder.submitted(1, last=True)
    recorder.finished(report(0, 2))
    recorder.finished(report(1, 0))
    assert seen == [(1, 1)]
    recorder.finished(report(0, 0))
    recorder.finished(report(0, 1))
    assert seen == [(1, 1), (0, 3)]
    assert (recorder.total().steps, recorder.total().buckets) == (2, 4)
    assert recorder.last_step().buckets == 3
    assert sorted(recorder.buckets()) == [0, 1, 2]


def test_what_is_handed_out_is_a_copy() -> None:
    recorder = Recorder()
    recorder.submitted(0, last=True)
    recorder.finished(report(0, 0))
    recorder.total().steps = 99
    recorder.buckets()[0].numel = 99
    assert (recorder.total().steps, recorder.buckets()[0].numel) == (1, 100)


def test_a_callback_that_fails_is_a_warning_and_the_others_still_run() -> None:
    recorder = Recorder()
    seen: list[int] = []
    recorder.callbacks += [lambda step, metrics: 1 / 0, lambda step, metrics: seen.append(step)]  # type: ignore[list-item,func-returns-value]
    recorder.submitted(4, last=True)
    with pytest.warns(UserWarning, match="step 4.*division by zero"):
        recorder.finished(report(4, 0))
    assert seen == [4]


def test_wire_errors_say_field_value_reason_sender_and_bucket() -> None:
    error = WireError("nnz", 7, "too many")
    assert str(error) == "bad payload: nnz = 7: too many"
    placed = error.at(rank=3, bucket=0)
    assert str(placed) == "bad payload from rank 3 for bucket 0: nnz = 7: too many"
    assert str(placed.at(rank=5)).startswith("bad payload from rank 5 for bucket 0")
    assert isinstance(error, RuntimeError)


def test_errors_of_the_caller_are_value_errors() -> None:
    assert issubclass(StateError, ValueError)
