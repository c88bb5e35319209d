"""What is queued on a side stream and what is not, and that bytes and results do not depend on where buffers are."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import pytest
import torch
from helpers import Cluster, plan

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.ddp.gradients import check_gradient
from sparsecomm.ddp.lanes import Lane
from sparsecomm.errors import ConfigError
from sparsecomm.exchange import exchange
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.device import Inline, device_problem, interleaved, side_of
from sparsecomm.types import ValueCodec

CPU = torch.device("cpu")


class Recorded(Inline):
    """A side that remembers when it was active, and behind what."""

    def __init__(self) -> None:
        self.inside = False
        self.behind: list[Any] = []

    @contextlib.contextmanager
    def active(self, after: Any = None) -> Generator[None, None, None]:
        self.behind.append(after)
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def drive(self, steps: Any, after: Any) -> Any:
        return interleaved(self, steps, after)


def test_only_steps_run_on_the_side_and_the_first_waits_for_the_gradient() -> None:
    side, seen = Recorded(), []

    def steps() -> Generator[str, None, int]:
        for name in ("one", "two"):
            seen.append(side.inside)
            yield name
        seen.append(side.inside)
        return 3

    driven = side.drive(steps(), "the gradient")
    assert next(driven) == "one"
    assert not side.inside, "others run now"
    assert next(driven) == "two"
    with pytest.raises(StopIteration) as stop:
        next(driven)
    assert stop.value.value == 3
    assert seen == [True, True, True]
    assert side.behind == ["the gradient", None, None]


def test_errors_and_closing_reach_the_steps_on_the_side() -> None:
    side, seen = Recorded(), []

    def steps() -> Generator[str, None, None]:
        try:
            yield "waiting"
        except BaseException as error:
            seen.append((type(error), side.inside))
            raise

    driven = side.drive(steps(), None)
    next(driven)
    with pytest.raises(ValueError, match="transport"):
        driven.throw(ValueError("transport"))
    driven = side.drive(steps(), None)
    next(driven)
    driven.close()
    assert seen == [(ValueError, True), (GeneratorExit, True)]


@pytest.mark.skipif("triton" not in kernels.available_paths(), reason="Triton's interpreter cannot run here")
@pytest.mark.parametrize("options", [{}, {"value_codec": ValueCodec.FP16}, {"dense": True}])
def test_an_exchange_with_tritons_kernels_and_memory_of_its_own(options: dict[str, Any]) -> None:
    results = {}
    for path in ("triton", "reference"):
        kernels.set_path(path)
        try:
            results[path] = exchanged(plan(1500, **options))
        finally:
            kernels.set_path(None)
    for mine, truth in zip(results["triton"], results["reference"], strict=True):
        assert torch.equal(mine, truth)


def exchanged(how: Any) -> list[torch.Tensor]:
    """Two steps of three ranks with work buffers apart from those of messages; averages and residuals."""
    cluster, out = Cluster(3, 1500), []
    memories = [Arena() for _ in range(3)]
    for step in range(2):
        grads = [
            torch.randn(1500, generator=torch.Generator().manual_seed(10 * step + r), dtype=torch.float32)
            for r in range(3)
        ]

        def make(channel: Any, grads: list[torch.Tensor] = grads) -> Any:
            r = channel.rank
            return exchange(channel, cluster.buckets[r], grads[r], how, cluster.arenas[r], memories[r])

        cluster.world.run(make)
        out += [g.clone() for g in grads]
    return out + cluster.residuals


class Elsewhere(Lane):
    """A lane whose gradients are not where collectives work."""

    def home(self, collective: Any) -> torch.device:
        return torch.device("meta")


def test_a_collective_that_works_on_the_host_gets_the_whole_gradient_there() -> None:
    averages = []
    for kind in (Lane, Elsewhere):
        cluster = Cluster(2, 200)
        grads = [torch.arange(200.0, dtype=torch.float32) * (r + 1) for r in range(2)]
        lanes = [kind(CPU, side_of(CPU), Arena(), Arena()) for _ in range(2)]

        def make(channel: Any, cluster: Any = cluster, grads: Any = grads, lanes: Any = lanes) -> Any:
            r, how = channel.rank, plan(200, collective="split_reduce")
            steps = lanes[r].steps(channel, cluster.buckets[r], lambda _: grads[r], how)
            return lanes[r].side.drive(steps, None)

        cluster.world.run(make)
        averages.append(grads)
    assert torch.equal(averages[0][0], averages[1][0])
    assert torch.equal(averages[1][0], averages[1][1])
    assert averages[0][0].count_nonzero() > 0


def test_other_devices_are_refused_by_name() -> None:
    assert device_problem(CPU, "no triton") is None
    assert "no triton" in str(device_problem(torch.device("cuda"), "no triton"))
    with pytest.raises(ConfigError, match=r"rank 1, bucket 2: gradients on meta .*CUDA"):
        check_gradient(torch.empty(3, device="meta", dtype=torch.float32), "rank 1, bucket 2")


def test_a_residual_moves_to_the_device_that_asks_for_it() -> None:
    layout = sc.feedback.BucketLayout.of([("w", torch.zeros(4, dtype=torch.float32))])
    store = sc.feedback.ResidualStore()
    store.bucket(layout).fill_(2.0)
    assert store.bucket(layout, "meta").device.type == "meta"
