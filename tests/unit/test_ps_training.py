"""The parameter server in one process: its results in every mode, compared with training without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_job import SimulatedJob, sgd

import sparsecomm as sc
from sparsecomm.ps.worker.link import Link, Steps

MODES = [sc.ps.Synchronous(), sc.ps.StaleSynchronous(2), sc.ps.Asynchronous()]


def network(seed: int = 3, *, hidden: int = 5) -> torch.nn.Module:
    torch.manual_seed(seed)
    ends = [torch.nn.Linear(7, hidden, dtype=torch.float32), torch.nn.Linear(hidden, 3, dtype=torch.float32)]
    return torch.nn.Sequential(ends[0], torch.nn.Tanh(), ends[1])


def batch(worker: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(100 * worker + step)
    inputs, targets = (torch.randn(4, n, generator=g, dtype=torch.float32) for n in (7, 3))
    return inputs, targets


def loss_of(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = ((model(inputs) - targets) ** 2).mean()
    return loss


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def training(
    link: Link, steps: int, compressor: Any, grads: list[torch.Tensor] | None = None, **options: Any
) -> Steps[tuple[torch.Tensor, sc.ps.Worker]]:
    """Steps of a simulated worker, which collects its gradients."""
    model = network()
    worker = sc.ps.Worker(model, compressor, link=link, **options)
    yield from worker.connecting()
    for step in range(steps):
        model.zero_grad()
        loss_of(model, *batch(worker.rank, step)).backward()
        if grads is not None:
            grads.append(torch.cat([p.grad.reshape(-1).clone() for p in model.parameters() if p.grad is not None]))
        yield from worker.stepping()
    yield from worker.leaving()
    return flat(model), worker


def finish(job: SimulatedJob) -> None:
    for _ in range(5):
        job.serve()
    assert all(s.finished for s in job.servers if s.mailbox.rank not in job.mailboxes.dead)


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def run(job: SimulatedJob, steps: int, compressor: Any, **options: Any) -> list[tuple[torch.Tensor, sc.ps.Worker]]:
    out = job.run([training(link, steps, compressor, **options) for link in job.links])
    for each in out:
        if isinstance(each, BaseException):
            raise each
    finish(job)
    return out


@pytest.mark.parametrize("servers", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("compressor", [sc.Dense(), sc.TopK(1.0)], ids=["dense", "topk"])
def test_synchronous_training_at_density_one_equals_training_on_the_joined_batch(
    workers: int, servers: int, compressor: Any
) -> None:
    got = run(SimulatedJob(workers, servers, optimizer=adamw), 12, compressor, value_codec="fp32")
    alone = network()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01)
    for step in range(12):
        optimizer.zero_grad()
        inputs, targets = zip(*(batch(w, step) for w in range(workers)), strict=True)
        loss_of(alone, torch.cat(inputs), torch.cat(targets)).backward()
        optimizer.step()
    for values, worker in got:
        assert torch.equal(values, got[0][0]), "all workers have the same bits"
        assert torch.allclose(values, flat(alone), rtol=1e-5, atol=1e-6)
        assert worker.versions == (12,) * servers


def test_no_server_holds_the_whole_model_and_shards_are_balanced() -> None:
    job = SimulatedJob(2, 3, optimizer=adamw, replicate=False)
    run(job, 1, sc.Dense())
    numel = flat(network()).numel()
    sizes = [sum(s.spec.numel for s in server.shards.values()) for server in job.servers]
    assert sum(sizes) == numel
    assert max(sizes) - min(sizes) <= 1
    cut = [p for server in job.servers for s in server.shards.values() for p in s.spec.pieces]
    assert any(p.end - p.start < torch.Size(p.shape).numel() for p in cut), "a tensor is split"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_values_that_are_not_applied_are_in_the_residuals(mode: sc.ps.Mode, codec: str) -> None:
    job = SimulatedJob(3, 2, optimizer=sgd, mode=mode)
    grads: list[list[torch.Tensor]] = [[], [], []]
    tasks = [training(link, 9, sc.TopK(0.1), g, value_codec=codec) for link, g in zip(job.links, grads, strict=True)]
    out = job.run(tasks)
    finish(job)
    shards = [s for server in job.servers for s in server.shards.values()]
    final = torch.cat([s.values for s in sorted(shards, key=lambda s: s.spec.index)])
    pushed = sum(sum(g).double() for g in grads) - sum(worker.residual().double() for _, worker in out)  # type: ignore[arg-type, misc]
    applied = (flat(network()) - final).double() * 3
    assert torch.allclose(applied, pushed, atol=2e-4)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_values_that_a_sparse_pull_leaves_out_come_later(codec: str) -> None:
    job = SimulatedJob(2, 2, optimizer=adamw, pull=sc.TopK(0.2), pull_codec=sc.types.ValueCodec[codec.upper()])

    def task(link: Link) -> Steps[tuple[torch.Tensor, torch.Tensor]]:
        model = network()
        worker = sc.ps.Worker(model, sc.TopK(0.1), link=link)
        yield from worker.connecting()
        for step in range(6):
            model.zero_grad()
            loss_of(model, *batch(worker.rank, step)).backward()
            yield from worker.stepping()
        behind = flat(model)
        for _ in range(60):
            yield from worker.pulling()
        yield from worker.leaving()
        return behind, flat(model)

    out = job.run([task(link) for link in job.links])
    truth = torch.cat([job.servers[i].shards[i].values for i in range(2)])
    for behind, later in out:
        assert not torch.allclose(behind, truth, atol=1e-4), "only 20% of the values that Adam changes were sent"
        assert torch.allclose(later, truth, atol=1e-6)


def test_a_thousandth_costs_a_two_hundredth_of_dense_push_and_pull() -> None:
    numel = 400_000

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(numel, dtype=torch.float32))

    def task(link: Link) -> Steps[sc.ps.WorkerMetrics]:
        model = Flat()
        worker = sc.ps.Worker(model, sc.TopK(0.001), link=link)
        yield from worker.connecting()
        before = worker.metrics()
        for step in range(4):
            model.weight.grad = torch.randn(
                numel, generator=torch.Generator().manual_seed(10 * worker.rank + step), dtype=torch.float32
            )
            yield from worker.stepping()
        after = worker.metrics()
        yield from worker.leaving()
        moved = after.bytes_sent + after.bytes_received - before.bytes_sent - before.bytes_received
        return (after.dense_bytes - before.dense_bytes) / moved

    job = SimulatedJob(2, 2, optimizer=sgd, pull=sc.TopK(0.002))
    for ratio in job.run([task(link) for link in job.links]):
        assert ratio >= 200, f"{ratio:.0f} times fewer bytes than dense, envelopes, headers, acknowledgements included"


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nobody_runs_further_ahead_than_the_mode_allows(mode: sc.ps.Mode) -> None:
    job = SimulatedJob(3, 2, optimizer=sgd, mode=mode)
    clocks, worst = {}, [0]

    def task(link: Link, pause: int) -> Steps[sc.ps.Worker]:
        model = network()
        worker = sc.ps.Worker(model, sc.TopK(0.1), link=link)
        yield from worker.connecting()
        for step in range(20):
            model.zero_grad()
            loss_of(model, *batch(worker.rank, step)).backward()
            yield from worker.stepping()
            clocks[worker.rank] = worker.clock
            if len(clocks) == 3 and min(clocks.values()) < 20:
                worst[0] = max(worst[0], max(clocks.values()) - min(clocks.values()))
            for _ in range(pause):
                yield "a pause"
        yield from worker.leaving()
        return worker

    out = job.run([task(link, pause) for link, pause in zip(job.links, (0, 0, 9), strict=True)])
    finish(job)
    if mode.lead is None:
        assert worst[0] > 5
    else:
        assert worst[0] <= mode.lead + 1  # the slow worker's push may be applied before its step ends
    stale = [w.metrics().mean_staleness for w in out]
    assert max(w.metrics().stalest for w in out) == (0 if mode.rounds else pytest.approx(out[2].metrics().stalest))
    assert mode.rounds or stale[2] > stale[0], "the slow worker's gradients are the stalest"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("compressor", [sc.TopK(0.1), sc.Dense()], ids=["topk", "dense"])
def test_a_gradient_that_is_not_finite_is_left_out(mode: sc.ps.Mode, compressor: Any) -> None:
    def task(link: Link) -> Steps[tuple[torch.Tensor, sc.ps.WorkerMetrics]]:
        model = network()
        worker = sc.ps.Worker(model, compressor, link=link)
        yield from worker.connecting()
        for step in range(4):
            model.zero_grad()
            loss_of(model, *batch(worker.rank, step)).backward()
            if worker.rank == 1 and step == 2:
                next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
            yield from worker.stepping()
        yield from worker.leaving()
        return flat(model), worker.metrics()

    job = SimulatedJob(2, 2, optimizer=sgd, mode=mode)
    out = job.run([task(link) for link in job.links])
    finish(job)
    assert all(bool(torch.isfinite(values).all()) for values, _ in out)
    assert [m.nonfinite for _, m in out] == [0, 1]


@pytest.mark.parametrize(
    "feedback", [sc.MomentumCorrection(0.9, clip_norm=1.0), sc.AdamCorrection(), None], ids=["dgc", "adam", "none"]
)
def test_other_kinds_of_feedback_train(feedback: Any) -> None:
    job = SimulatedJob(2, 2, optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    inputs, targets = batch(0, 0)
    before = float(loss_of(network(), inputs, targets).detach())

    def task(link: Link) -> Steps[float]:
        model = network()
        worker = sc.ps.Worker(model, sc.TopK(0.2), feedback=feedback, link=link)
        yield from worker.connecting()
        for _ in range(40):
            model.zero_grad()
            loss_of(model, inputs, targets).backward()
            yield from worker.stepping()
        yield from worker.leaving()
        return float(loss_of(model, inputs, targets).detach())

    assert all(after < 0.8 * before for after in job.run([task(link) for link in job.links]))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_default_dtype_of_torch_does_not_matter(default: torch.dtype, codec: str) -> None:
    expected = run(SimulatedJob(2, 2, optimizer=adamw), 6, sc.TopK(0.2), value_codec=codec)
    torch.set_default_dtype(default)
    try:
        found = run(SimulatedJob(2, 2, optimizer=adamw), 6, sc.TopK(0.2), value_codec=codec)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0][0], expected[0][0])


def test_the_rate_follows_the_number_of_updates() -> None:
    job = SimulatedJob(1, 1, optimizer=sgd, rate=lambda version: 0.0 if version >= 2 else 0.1)
    seen = []

    def task(link: Link) -> Steps[None]:
        model = network()
        worker = sc.ps.Worker(model, sc.Dense(), link=link)
        yield from worker.connecting()
        for step in range(4):
            model.zero_grad()
            loss_of(model, *batch(0, step)).backward()
            yield from worker.stepping()
            seen.append(flat(model))
        yield from worker.leaving()

    job.run([task(link) for link in job.links])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[3])


GROUPS: dict[str, Any] = {
    "the first has the optimizer's": ([None, 0.01], 0.1, [1.0, 0.1]),
    "the last has the optimizer's": ([1.0, None], 0.1, [10.0, 1.0]),
    "all have their own": ([0.2, 0.8], 0.003, [0.25, 1.0]),
}


def grouped(
    rates: list[float | None], own: float, make: Any = torch.optim.SGD
) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """An optimizer factory that puts weights and biases into groups; a shard without one kind lacks that group."""

    def factory(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = []
        for kind, rate in zip(("weight", "bias"), rates, strict=True):
            chosen = [p for p in parameters if p.ps_name.endswith(kind)]  # type: ignore[attr-defined]
            if chosen:
                groups.append({"params": chosen} | ({} if rate is None else {"lr": rate}))
        optimizer: torch.optim.Optimizer = make(groups, lr=own)
        return optimizer

    return factory


@pytest.mark.parametrize("servers", [1, 4])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_rate_keeps_the_ratios_between_groups(groups: Any, servers: int) -> None:
    """With four servers some shards have weights alone."""
    rates, own, ratios = groups
    job = SimulatedJob(1, servers, optimizer=grouped(rates, own), rate=lambda version: 0.5 / (version + 1))
    got, _ = run(job, 4, sc.Dense())[0]
    alone = network()
    kinds = [[p for n, p in alone.named_parameters() if n.endswith(kind)] for kind in ("weight", "bias")]
    optimizer = torch.optim.SGD([{"params": k, "lr": 0.5 * r} for k, r in zip(kinds, ratios, strict=True)])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(4):
        optimizer.zero_grad()
        loss_of(alone, *batch(0, step)).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(got, flat(alone), rtol=1e-5, atol=1e-6)


def test_the_ratios_survive_the_death_of_a_server() -> None:
    """The copy was made when the rate had moved on already."""
    options = {"optimizer": grouped([None, 0.01], 0.1), "rate": lambda version: 0.5 / (version + 1)}
    expected = run(SimulatedJob(2, 3, **options), 8, sc.Dense())[0][0]
    for turn in range(6, 24, 3):
        job = SimulatedJob(2, 3, **options)

        def kill(now: int, job: SimulatedJob = job, turn: int = turn) -> None:
            if now == turn:
                job.mailboxes.kill(3)

        out = job.run([training(link, 8, sc.Dense()) for link in job.links], between=kill)
        assert torch.equal(out[0][0], expected)


def test_an_optimizer_without_rates_of_its_own_gets_the_rate() -> None:
    class Bare:
        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            self.param_groups = [{"params": parameters}]

        def step(self) -> None:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad, alpha=self.param_groups[0]["lr"])  # type: ignore[call-overload]

        def state_dict(self) -> dict[str, Any]:
            return {}

    expected = run(SimulatedJob(1, 1, optimizer=sgd, rate=lambda _: 0.3), 3, sc.Dense())[0][0]
    got = run(SimulatedJob(1, 1, optimizer=Bare, rate=lambda _: 0.3), 3, sc.Dense())[0][0]
    assert torch.allclose(got, expected, rtol=1e-6)
