"""The watch on convergence: ages, norms, what must not disturb them, their limits, and the one warning."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Cluster, gradient, layout, plan, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm.compress import ChunkTopK, Compressor, CyclicTopK, RandomK, Sign, TopK
from sparsecomm.ddp import convergence
from sparsecomm.ddp.convergence import ConvergenceAlarm, combine, problems
from sparsecomm.feedback import AdamCorrection, ErrorFeedback, Feedback, MomentumCorrection, Seen, Watch
from sparsecomm.types import ValueCodec

N = 100  # all of it is watched
COMPRESSORS: list[tuple[Compressor, str]] = [
    (TopK(0.05), "allgather"),
    (ChunkTopK(0.1, chunk=8), "chunked"),
    (RandomK(0.05), "shared_index"),
    (CyclicTopK(0.05), "shared_index"),
]


def watched(size: int, numel: int = N) -> Cluster:
    """Simulated ranks, each with a watch."""
    cluster = Cluster(size, numel)
    for bucket in cluster.buckets:
        bucket.watch = Watch(bucket.layout)
    return cluster


def watch_of(cluster: Cluster, rank: int = 0) -> Watch:
    """The watch of a rank."""
    found = cluster.buckets[rank].watch
    assert found is not None
    return found


def seen(cluster: Cluster, rank: int = 0) -> Seen:
    """The figures of a rank."""
    found = watch_of(cluster, rank).seen()
    assert found is not None
    return found


def gradients(size: int, step: int, numel: int = N) -> list[torch.Tensor]:
    """A gradient for each rank."""
    return [gradient("normal", numel, torch.float32, 100 * step + r) for r in range(size)]


def by_place(cluster: Cluster, ages: Any, rank: int = 0) -> torch.Tensor:
    """Ages in the order of the elements."""
    out = torch.zeros(len(ages), dtype=torch.float32)
    out[watch_of(cluster, rank)._drawn] = torch.from_numpy(ages)
    return out


# --- figures ----------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(COMPRESSORS),
    codec=st.sampled_from([ValueCodec.FP32, ValueCodec.FP16]),
    size=st.integers(1, 3),
    skips=st.lists(st.booleans(), min_size=1, max_size=12),
    first=st.sampled_from([0, 0, 0, 60]),
)
@settings(max_examples=20)
def test_ages_are_those_of_the_elements_that_have_not_left(
    kind: tuple[Compressor, str], codec: ValueCodec, size: int, skips: list[bool], first: int
) -> None:
    cluster, ages = watched(size), torch.zeros(size, N, dtype=torch.float32)
    final = [False] * first + skips  # also more steps than the watch has rows
    for step, skipped in enumerate(final):
        grads = gradients(size, step)
        sums = [r + g for r, g in zip(cluster.residuals, grads, strict=True)]
        compressor, collective = kind
        how = {"compressor": compressor, "collective": collective, "value_codec": codec, "step": step}
        cluster.step(grads, plan(N, **how), final=False)
        for rank, bucket in enumerate(cluster.buckets):
            residual = cluster.residuals[rank]
            left = (residual != sums[rank]) | (residual == 0)
            bucket.finish_step(skipped=skipped)
            if collective != "allgather":  # the residual changes when the step is final
                left = (residual != sums[rank]) | (residual == 0)
            if not skipped:
                ages[rank] = (ages[rank] + 1) * ~left
    kept = final.count(False)
    for rank in range(size):
        found = watch_of(cluster, rank).seen()
        if found is not None:
            assert found.steps == kept
            assert torch.equal(by_place(cluster, found.ages, rank), ages[rank])


@dataclass(frozen=True)
class Units:
    """A feedback, and the norm of the vector that it adds to the residual in the first step over the gradient's."""

    feedback: Feedback
    expected: Any


@pytest.mark.parametrize(
    "units",
    [
        Units(ErrorFeedback(), lambda g: g),
        Units(MomentumCorrection(0.9), lambda g: g),
        Units(MomentumCorrection(0.9, nesterov=True), lambda g: 1.9 * g),
        Units(AdamCorrection(), lambda g: g.sign()),
    ],
    ids=lambda units: str(units.feedback),
)
def test_norms_are_in_the_units_of_the_residual(units: Units) -> None:
    cluster = watched(1)
    if not isinstance(units.feedback, ErrorFeedback):
        cluster.buckets[0].velocity = torch.zeros(N, dtype=torch.float32)
        cluster.buckets[0].second_moment = torch.zeros(N, dtype=torch.float32)
    grad = gradients(1, 0)[0]
    cluster.step([grad * 1024.0], plan(N, feedback=units.feedback, grad_scale=1024.0))
    found = seen(cluster)
    assert math.isclose(found.added, float(units.expected(grad).norm()), rel_tol=1e-4)
    assert math.isclose(found.residual, float(cluster.residuals[0].norm()), rel_tol=1e-5)


def test_norms_of_a_large_bucket_are_estimates() -> None:
    n = 200_000
    cluster = watched(1, n)
    for step in range(9):
        cluster.step(gradients(1, step, n), plan(n, density=0.01, step=step))
    found = seen(cluster)
    assert math.isclose(found.added, math.sqrt(n), rel_tol=0.15)
    assert math.isclose(found.residual, float(cluster.residuals[0].norm()), rel_tol=0.3)
    assert found.ages is not None
    assert found.ages.shape == (128,)


def test_a_skipped_step_leaves_no_trace() -> None:
    cluster = watched(2)
    cluster.step(gradients(2, 0), plan(N))
    before = seen(cluster)
    bad = gradients(2, 1)
    bad[1][3] = math.inf
    cluster.step(bad, plan(N, step=1))
    after = seen(cluster)
    assert (after.steps, after.residual, after.added) == (before.steps, before.residual, before.added)
    assert np.array_equal(after.ages, before.ages)  # type: ignore[arg-type]


def test_what_was_set_aside_of_unused_parameters_still_waits() -> None:
    cluster = watched(1)
    cluster.step(gradients(1, 0), plan(N, density=0.05))
    waits = by_place(cluster, seen(cluster).ages)[:40]
    grad = gradients(1, 1)[0]
    grad[:40] = 0.0
    for compressor, collective in COMPRESSORS[:2]:
        cluster.step([grad.clone()], plan(N, compressor=compressor, collective=collective, unused=((0, 40),)))
    assert torch.equal(by_place(cluster, seen(cluster).ages)[:40], waits * 3)


def test_a_dense_exchange_begins_anew() -> None:
    cluster = watched(2)
    assert watch_of(cluster).seen() is None
    for step in range(3):
        cluster.step(gradients(2, step), plan(N, step=step))
    cluster.step(gradients(2, 3), plan(N, dense=True, step=3))
    assert watch_of(cluster).seen() is None
    cluster.step(gradients(2, 4), plan(N, step=4))
    assert seen(cluster).steps == 1


def test_nothing_waits_where_a_part_of_every_element_is_sent() -> None:
    cluster = watched(2)
    for step in range(3):
        cluster.step(gradients(2, step), plan(N, compressor=Sign(), collective="sign", step=step))
    found = seen(cluster)
    assert found.steps == 3
    assert found.ages is None
    assert found.residual > 0
    for step in range(3, 5):  # the first restarts the watch, the second is weighed
        cluster.step(gradients(2, step), plan(N, step=step))
    assert seen(cluster).ages is not None


@pytest.mark.parametrize(("compressor", "collective"), COMPRESSORS, ids=str)
def test_the_watch_changes_no_bit(compressor: Compressor, collective: str) -> None:
    with_watch, without = watched(3), Cluster(3, N)
    for step in range(5):
        how = plan(N, compressor=compressor, collective=collective, value_codec=ValueCodec.FP16, step=step)
        ours, theirs = gradients(3, step), gradients(3, step)
        with_watch.step(ours, how)
        without.step(theirs, how)
        for a, b in zip(ours + with_watch.residuals, theirs + without.residuals, strict=True):
            assert same_bits(a, b)


def test_the_places_depend_on_the_layout_alone() -> None:
    def drawn(numel: int, name: str) -> torch.Tensor:
        return Watch(layout(numel, name))._drawn

    assert torch.equal(drawn(10**6, "a"), drawn(10**6, "a"))
    assert not torch.equal(drawn(10**6, "a"), drawn(10**6, "b"))
    assert drawn(10**6, "a").shape == (1024,)
    assert drawn(300, "a").sort().values.tolist() == list(range(300))
    assert drawn(0, "a").shape == (0,)


def test_tensors_of_a_gpu_give_the_same_ages_as_arrays_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host, gpu = Watch(layout(N)), Watch(layout(N))
    residual, grad = torch.zeros(N, dtype=torch.float32), torch.ones(N, dtype=torch.float32)
    for watch in (host, gpu):
        watch.began(grad, 1.0, residual)
    for name in ("_source", "_aged", "_table", "_ages", "_numbers"):
        setattr(gpu, name, torch.as_tensor(getattr(gpu, name)))
    gpu._rows = list(gpu._table)
    for step in range(150):
        residual.copy_(
            (torch.rand(N, generator=torch.Generator().manual_seed(step), dtype=torch.float32) > 0.02).float()
        )
        for watch in (host, gpu):
            watch.began(grad, 1.0, residual)
            if step % 3 == 0:
                watch.look_before()
                residual[step % N] += 1.0
            watch.look()
            watch.keep()
    a, b = host.seen(), gpu.seen()
    assert a is not None
    assert b is not None
    assert np.array_equal(a.ages, b.ages)  # type: ignore[arg-type]
    assert np.unique(a.ages).size > 10  # type: ignore[arg-type]


def test_another_thread_may_read_all_the_time() -> None:
    cluster, stop, errors = watched(1), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                found = watch_of(cluster).seen()
                assert found is None or found.ages is None or found.ages.max() <= found.steps
            except BaseException as error:
                errors.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(300):
        cluster.step(gradients(1, step), plan(N, dense=step % 150 == 149, step=step))
    stop.set()
    reader.join()
    assert not errors


# --- over all buckets -------------------------------------------------------------------------------------------


def bucket(numel: int, ages: list[float] | None, *, steps: int = 10, residual: float = 0.0, added: float = 1.0) -> Seen:
    """Figures of a bucket."""
    return Seen(numel, steps, residual, added, None if ages is None else np.array(ages, dtype=np.float32))


def test_buckets_count_by_their_elements() -> None:
    found = combine([bucket(300, [0, 4, 10], residual=3.0), bucket(100, [2, 2], residual=4.0, steps=9, added=0.0)])
    assert found is not None
    assert found.residual_ratio == 5.0
    assert math.isclose(found.mean_age, (100 * 4 + 100 * 10 + 100 * 2) / 300)
    assert found.p90_age == 10
    assert math.isclose(found.never_sent, 100 / 400)
    assert found.steps == 9
    assert "5.0 times" in str(found)


def test_figures_of_odd_buckets() -> None:
    assert combine([]) is None
    whole = combine([bucket(10, None, residual=2.0)])
    assert whole is not None
    assert (whole.residual_ratio, math.isnan(whole.mean_age), math.isnan(whole.never_sent)) == (2.0, True, True)
    assert "waits" not in str(whole)
    idle = combine([bucket(10, [0, 0], added=0.0)])
    assert idle == sc.Convergence(0.0, 0.0, 0.0, 0.0, 10)
    stuck = combine([bucket(10, [10, 10], residual=1.0, added=0.0)])
    assert stuck is not None
    assert (stuck.residual_ratio, stuck.never_sent) == (math.inf, 1.0)


def test_limits_scale_with_the_density() -> None:
    found = sc.Convergence(residual_ratio=500.0, mean_age=700.0, p90_age=6000.0, never_sent=0.6, steps=2500)
    assert len(problems(found, 0.01)) == 3
    assert len(problems(found, 0.001)) == 2
    assert problems(found, 0.0001) == [], "too early"
    whole = sc.Convergence(1.0, math.nan, math.nan, math.nan, 2500)
    assert problems(whole, 0.01) == []


# --- the warning ------------------------------------------------------------------------------------------------

BAD = sc.Convergence(residual_ratio=1.0, mean_age=1.0, p90_age=1.0, never_sent=0.9, steps=10**6)
GOOD = sc.Convergence(residual_ratio=1.0, mean_age=1.0, p90_age=1.0, never_sent=0.1, steps=10**6)


@pytest.fixture
def heard() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of a test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def run(alarm: ConvergenceAlarm, steps: range, density: Any, found: sc.Convergence | None) -> None:
    """Steps as a state takes them."""
    for step in steps:
        if step >= alarm.due:
            alarm.check(step, density(step) if callable(density) else density, lambda: found)


def test_it_warns_once_after_a_sustained_time(heard: list[warnings.WarningMessage]) -> None:
    alarm = ConvergenceAlarm()
    run(alarm, range(500), 0.01, BAD)
    assert heard == []
    run(alarm, range(500, 5000), 0.01, BAD)
    assert len(heard) == 1
    text = str(heard[0].message)
    assert "90% of the elements" in text
    assert "convergence()" in text
    alarm.begin_again(5000)
    run(alarm, range(5000, 9000), 0.01, BAD)
    assert len(heard) == 1, "once per state"


@pytest.mark.parametrize(
    ("density", "found"),
    [
        (0.01, GOOD),
        (0.01, None),
        (1.0, BAD),
        (sc.Geometric(0.25, 0.001, 5000), BAD),
        (0.01, sc.Convergence(1.0, 1.0, 1.0, 0.9, 50)),
    ],
    ids=["healthy", "dense", "no density", "falling", "few steps"],
)
def test_it_is_silent(density: Any, found: sc.Convergence | None, heard: list[warnings.WarningMessage]) -> None:
    run(ConvergenceAlarm(), range(5000), density, found)
    assert heard == []


def test_good_checks_and_changes_in_between_count_from_the_start(heard: list[warnings.WarningMessage]) -> None:
    alarm = ConvergenceAlarm()
    for begin in range(0, 4000, 1000):
        run(alarm, range(begin, begin + 500), 0.01, BAD)
        run(alarm, range(begin + 500, begin + 1000), 0.01, GOOD)
    alarm = ConvergenceAlarm()
    for begin in range(0, 4000, 400):
        run(alarm, range(begin, begin + 400), 0.01, BAD)
        alarm.begin_again(begin + 400)
    assert len(heard) <= 1


def test_warnings_that_are_errors_do_not_reach_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ConvergenceAlarm(), range(5000), 0.01, BAD)
    assert capsys.readouterr().err.count("compression may slow convergence") == 1
    assert convergence.SUSTAINED > 1
