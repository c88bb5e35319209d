"""Pushes that leave in backward have the same result as those that leave after it, even if gradients change between."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_job import SimulatedJob

import sparsecomm as sc
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.worker.link import Link, Steps

STEPS = 5


class Network(torch.nn.Module):
    """Layers of one size. By kind, the third shares the second's weight, the fourth is unused or the fifth frozen."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6, dtype=torch.float32) for _ in range(5))
        self.used = [0, 1, 2, 4] if kind == "unused" else [0, 1, 2, 3, 4]
        if kind == "shared":
            self.layers[2].weight = self.layers[1].weight
        if kind == "frozen":
            self.layers[4].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.used:
            x = torch.tanh(self.layers[i](x))
        return x


def loss_of(model: torch.nn.Module, worker: int, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * worker + step)
    loss: torch.Tensor = model(torch.randn(3, 6, generator=g, dtype=torch.float32)).square().sum()
    return loss


def backward(worker: sc.ps.Worker, step: int) -> None:
    loss_of(worker.model, worker.rank, step).backward()


def accumulated(worker: sc.ps.Worker, step: int) -> None:
    with worker.no_sync():
        backward(worker, step)
    backward(worker, step + 50)


def twice(worker: sc.ps.Worker, step: int) -> None:
    backward(worker, step)
    backward(worker, step + 50)


def clipped(worker: sc.ps.Worker, step: int) -> None:
    backward(worker, step)
    torch.nn.utils.clip_grad_norm_(worker.model.parameters(), 0.1)


def scaled_behind_autograd(worker: sc.ps.Worker, step: int) -> None:
    backward(worker, step)
    for p in worker.model.parameters():
        if p.grad is not None:
            p.grad.data.mul_(0.5)


def thrown_away(worker: sc.ps.Worker, step: int) -> None:
    if step == 2:
        backward(worker, 70)
        worker.model.zero_grad()
    backward(worker, step)


def not_finite(parameter: int) -> Callable[[sc.ps.Worker, int], None]:
    def compute(worker: sc.ps.Worker, step: int) -> None:
        chosen = list(worker.model.parameters())[parameter]
        bad = step == 2 and worker.rank == 0
        handle = chosen.register_hook(lambda grad: grad * float("nan")) if bad else None
        backward(worker, step)
        if handle is not None:
            handle.remove()

    return compute


def training(link: Link, compute: Callable[[sc.ps.Worker, int], None], kind: str, **options: Any) -> Steps[Any]:
    model = Network(kind)
    worker = sc.ps.Worker(model, options.pop("compressor", sc.TopK(0.2)), link=link, **options)
    yield from worker.connecting()
    for step in range(STEPS):
        model.zero_grad()
        compute(worker, step)
        yield "another turn"
        yield from worker.stepping()
    yield from worker.leaving()
    flat = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    return flat, worker.residual(), worker.metrics()


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def trained(
    compute: Callable[[sc.ps.Worker, int], None] = backward,
    kind: str = "plain",
    servers: int = 3,
    mode: sc.ps.Mode | None = None,
    between: Callable[[int, SimulatedJob], None] | None = None,
    **options: Any,
) -> list[Any]:
    job = SimulatedJob(2, servers, optimizer=sgd, mode=mode or sc.ps.Synchronous())
    tasks = [training(link, compute, kind, **options) for link in job.links]
    out = job.run(tasks, between=None if between is None else lambda turn: between(turn, job))
    for each in out:
        if isinstance(each, BaseException):
            raise each
    return out


def assert_same_bits(early: list[Any], late: list[Any]) -> None:
    for a, b in zip(early, late, strict=True):
        assert torch.equal(a[0], b[0]), "parameters"
        assert torch.equal(a[1], b[1]), "residuals"
        assert (a[2].nnz, a[2].nonfinite) == (b[2].nnz, b[2].nonfinite)
        assert a[2].retracted == b[2].early_bytes == 0


OPTIONS: list[dict[str, Any]] = [
    {},
    {"value_codec": "fp16"},
    {"value_codec": "int8"},
    {"compressor": sc.Dense()},
    {"compressor": sc.Dense(), "value_codec": "fp16"},
    {"feedback": sc.MomentumCorrection(0.9)},
    {"feedback": sc.AdamCorrection(), "value_codec": "fp16"},
    {"feedback": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "unused", "shared", "frozen"])
def test_the_same_bits_as_without_overlap(kind: str, options: dict[str, Any]) -> None:
    early = trained(kind=kind, **options)
    assert_same_bits(early, trained(kind=kind, overlap=False, **options))
    assert all(metrics.early_bytes > 0 for _, _, metrics in early)


def test_bytes_leave_before_backward_ends() -> None:
    seen: list[tuple[int, int]] = []

    def compute(worker: sc.ps.Worker, step: int) -> None:
        traffic = worker.link.mailbox.traffic
        before = traffic.bytes_sent
        # The first layer's gradient is computed last; this hook runs before it is stored.
        handle = worker.model.layers[0].weight.register_hook(  # type: ignore[union-attr, operator]
            lambda _: seen.append((before, traffic.bytes_sent))
        )
        backward(worker, step)
        handle.remove()

    trained(compute, servers=3, compressor=sc.Dense())
    assert len(seen) == 2 * STEPS
    third = 4 * sum(p.numel() for p in Network().parameters()) // 3
    assert all(then - before > third for before, then in seen), "at least the last layers' shard has left"


def test_accumulated_gradients_are_pushed_once() -> None:
    early = trained(accumulated)
    assert_same_bits(early, trained(accumulated, overlap=False))
    assert all(metrics.early_bytes > 0 for _, _, metrics in early)


@pytest.mark.parametrize("compute", [twice, clipped, scaled_behind_autograd])
def test_gradients_that_change_after_backward_are_sent_again(compute: Any) -> None:
    with pytest.warns(UserWarning, match="gradients change after backward has computed them"):
        early = trained(compute)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late = trained(compute, overlap=False)
    for a, b in zip(early, late, strict=True):
        assert a[2].retracted > 0
        assert torch.allclose(a[0], b[0], atol=1e-5)
        assert torch.allclose(a[1], b[1], atol=1e-5)


def test_a_backward_that_is_thrown_away_once_does_not_end_overlapping() -> None:
    early, late = trained(thrown_away), trained(thrown_away, overlap=False)
    for a, b in zip(early, late, strict=True):
        assert a[2].retracted > 0
        assert torch.allclose(a[0], b[0], atol=1e-5)


@pytest.mark.parametrize("parameter", [0, 4, 9])
def test_a_gradient_that_is_not_finite_counts_in_no_shard(parameter: int) -> None:
    early, late = (trained(not_finite(parameter), overlap=o, feedback=sc.ErrorFeedback()) for o in (True, False))
    for worker, (a, b) in enumerate(zip(early, late, strict=True)):
        assert a[2].nonfinite == b[2].nonfinite == (worker == 0)
        assert torch.isfinite(a[0]).all()
        assert torch.allclose(a[0], b[0], atol=1e-6)
        assert torch.allclose(a[1], b[1], atol=1e-6)


@pytest.mark.parametrize("mode", [sc.ps.StaleSynchronous(1), sc.ps.Asynchronous()], ids=str)
def test_other_modes(mode: sc.ps.Mode) -> None:
    for _, _, metrics in trained(mode=mode):
        assert metrics.early_bytes > 0
        assert metrics.acknowledged == 3 * STEPS


@pytest.mark.parametrize("victim", [2, 3, 4])
def test_a_server_dies_between_an_early_push_and_its_commit(victim: int) -> None:
    expected = trained()
    for turn in range(2, 40):

        def kill(now: int, job: SimulatedJob, turn: int = turn) -> None:
            if now == turn:
                job.mailboxes.kill(victim)

        for a, b in zip(trained(between=kill), expected, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_a_worker_may_leave_between_backward_and_step() -> None:
    def task(link: Link) -> Steps[torch.Tensor]:
        model = Network()
        worker = sc.ps.Worker(model, link=link)
        yield from worker.connecting()
        backward(worker, 0)
        assert worker.metrics().early_bytes > 0
        yield from worker.leaving()
        backward(worker, 1)  # the hooks are gone
        return worker.residual()

    job = SimulatedJob(2, 2, optimizer=sgd)
    for residual in job.run([task(link) for link in job.links]):
        assert torch.allclose(residual, torch.zeros_like(residual), atol=1e-6)
    assert all(s.shards[i].version == 0 for i, s in enumerate(job.servers))


def test_a_commit_without_a_push_is_refused() -> None:
    job = SimulatedJob(1, 1, optimizer=sgd)

    def task(link: Link) -> Steps[None]:
        worker = sc.ps.Worker(Network(), link=link)
        yield from worker.connecting()
        link.mailbox.send(1, ms.pack(Envelope(Kind.COMMIT, 0, 0, clock=0)))
        backward(worker, 0)
        yield from worker.stepping()

    (error,) = job.run([task(job.links[0])])
    assert "clock = 0: no push of it is pending here" in str(error)
