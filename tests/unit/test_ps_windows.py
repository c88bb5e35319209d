"""Pulls that read a shard from a window bring the same values as other pulls, and never use a torn read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_job import Flat, SimulatedJob, sgd
from simulated_mailbox import SimulatedWindow

import sparsecomm as sc
from sparsecomm.ps.protocol.board import board_bytes
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.board import Board
from sparsecomm.ps.server.rules import Rules
from sparsecomm.ps.server.shard import Shard
from sparsecomm.ps.worker.link import Link, Steps
from sparsecomm.ps.worker.puller import Puller
from sparsecomm.ps.worker.window import read_board

NUMEL, STEPS = 300, 6


def training(link: Link) -> Steps[tuple[list[torch.Tensor], sc.ps.Worker]]:
    model = Flat(NUMEL)
    worker = sc.ps.Worker(model, sc.TopK(0.1), link=link)
    yield from worker.connecting()
    seen = []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(100 * worker.rank + step)
        model.weight.grad = torch.randn(NUMEL, generator=g, dtype=torch.float32)
        yield from worker.stepping()
        seen.append(model.weight.detach().clone())
    yield from worker.leaving()
    return seen, worker


def trained(mode: sc.ps.Mode, *, windows: bool) -> tuple[SimulatedJob, list[Any]]:
    job = SimulatedJob(3, 2, optimizer=sgd, mode=mode, windows=windows)
    out = job.run([training(link) for link in job.links])
    for each in out:
        if isinstance(each, BaseException):
            raise each
    return job, out


def test_synchronous_workers_see_the_same_bits_as_when_they_ask() -> None:
    (_, read), (_, asked) = (trained(sc.ps.Synchronous(), windows=w) for w in (True, False))
    for (a, worker), (b, _) in zip(read, asked, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert worker.explain() == "pulls: one_sided"
        assert worker.versions == (STEPS, STEPS)


@pytest.mark.parametrize("mode", [sc.ps.StaleSynchronous(1), sc.ps.Asynchronous()], ids=str)
def test_other_modes_end_with_the_values_of_the_servers(mode: sc.ps.Mode) -> None:
    job, out = trained(mode, windows=True)
    truth = torch.cat([job.servers[i].shards[i].values for i in range(2)])
    assert any(torch.equal(seen[-1], truth) for seen, _ in out)
    assert all(server.shards[i].version == 3 * STEPS for i, server in enumerate(job.servers))


# --- torn reads ---


def board(numel: int = NUMEL) -> tuple[SimulatedWindow, Board, Shard]:
    memories = {0: torch.zeros(board_bytes(numel), dtype=torch.uint8)}
    window = SimulatedWindow(memories, 0)
    spec = ModelLayout(("weight",), ((numel,),)).shard(0, 1)
    shard = Shard(spec, Rules(optimizer=sgd, workers=(0, 1), world=3))
    shard.start(torch.zeros(numel, dtype=torch.float32))
    made = Board(window, numel)
    made.show(shard)
    return window, made, shard


def read(window: SimulatedWindow, slowest: int | None = None) -> tuple[int | None, torch.Tensor, int, int]:
    out, torn = torch.full((NUMEL,), -1.0, dtype=torch.float32), [0]
    steps = read_board(window, 0, out, slowest, "server rank 0", torn)
    yields = 0
    while True:
        try:
            next(steps)
            yields += 1
            assert yields < 100
        except StopIteration as stop:
            return stop.value, out, torn[0], yields


@pytest.mark.parametrize("updates", range(8))
def test_a_read_that_meets_updates_is_done_again(updates: int) -> None:
    window, made, shard = board()
    remaining = [updates]

    def update() -> None:
        if remaining[0]:
            remaining[0] -= 1
            shard.values.add_(1.0)
            shard.version += 1
            made.show(shard)

    window.during = update
    version, out, torn, _ = read(window)
    assert (version, torn) == (updates, updates)
    assert torch.equal(out, torch.full((NUMEL,), float(updates), dtype=torch.float32))


def test_a_read_that_always_meets_updates_is_given_up() -> None:
    window, made, shard = board()

    def update() -> None:
        shard.values.add_(1.0)
        shard.version += 1
        made.show(shard)

    window.during = update
    version, out, torn, _ = read(window)
    assert (version, torn) == (None, 8)
    assert out.min() != out.max(), "a torn read"


def test_an_update_that_is_not_finished_is_not_read() -> None:
    window, _, _ = board()
    window.memory[:8].view(torch.int64).add_(1)
    version, out, torn, _ = read(window)
    assert (version, torn) == (None, 8)
    assert bool((out == -1.0).all()), "the values were not read"


def test_a_reader_waits_for_the_slowest_worker() -> None:
    window, made, shard = board()
    steps = read_board(window, 0, torch.empty(NUMEL, dtype=torch.float32), 1, "server rank 0", [0])
    assert next(steps) == "workers that are behind, at server rank 0"
    shard.clocks = {0: 1, 1: 0}
    made.show(shard)
    next(steps)
    shard.clocks = {0: 1, 1: 1}
    made.show(shard)
    with pytest.raises(StopIteration):
        next(steps)


def test_after_too_many_torn_reads_the_server_is_asked() -> None:
    job = SimulatedJob(1, 1, optimizer=sgd, mode=sc.ps.Asynchronous(), windows=True)

    def task(link: Link) -> Steps[sc.ps.Worker]:
        model = Flat(NUMEL)
        worker = sc.ps.Worker(model, sc.Dense(), link=link)
        yield from worker.connecting()
        window = worker._puller._window
        assert isinstance(window, SimulatedWindow)
        server = job.servers[0]

        def update() -> None:
            server.shards[0].values.add_(1.0)
            server.shards[0].version += 1
            server._answers[0].show()

        window.during = update
        yield from worker.pulling()
        window.during = None
        assert (worker.metrics().torn, worker.metrics().fallbacks) == (8, 1)
        assert torch.equal(model.weight.detach(), torch.full((NUMEL,), 8.0, dtype=torch.float32))
        assert worker.versions == (8,)
        yield from worker.leaving()
        return worker

    (out,) = job.run([task(job.links[0])])
    assert isinstance(out, sc.ps.Worker), out


# --- choosing ---


@pytest.mark.parametrize("density", [None, 0.01])
def test_a_choice_explains_its_costs(density: float | None) -> None:
    job = SimulatedJob(1, 2, optimizer=sgd, windows=True, pull=None if density is None else sc.TopK(density))

    def task(link: Link) -> Steps[sc.ps.Worker]:
        from dataclasses import replace

        sparse = None if density is None else sc.TopK(density)
        worker = sc.ps.Worker(Flat(NUMEL), link=replace(link, pull_by="auto", sparse=sparse))
        yield from worker.connecting()
        worker.model.weight.grad = torch.ones(NUMEL, dtype=torch.float32)
        yield from worker.stepping()
        yield from worker.leaving()
        return worker

    (worker,) = job.run([task(job.links[0])])
    assert isinstance(worker, sc.ps.Worker), worker
    puller: Puller = worker._puller
    assert {c.way for c in puller.costs} == {"dense", "one_sided", *([] if density is None else ["sparse"])}
    assert puller.costs == sorted(puller.costs, key=lambda c: c.seconds)
    assert puller.way == puller.costs[0].way
    nbytes = {c.way: c.nbytes for c in puller.costs}
    assert 4 * NUMEL == nbytes["one_sided"] < nbytes["dense"] < 4 * NUMEL + 400
    assert density is None or nbytes["sparse"] < 400
    assert worker.explain().splitlines()[0] == f"pulls: {puller.way}"
    assert len(worker.explain().splitlines()) == 1 + len(puller.costs)
