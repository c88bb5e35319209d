"""Errors of a timeout name the ranks that are late, and not those that wait for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_job import Flat, SimulatedJob, sgd

import sparsecomm as sc
from sparsecomm.errors import CommTimeout
from sparsecomm.ps.loops import _Driver
from sparsecomm.ps.protocol.messages import Kind
from sparsecomm.ps.report import waits_for
from sparsecomm.ps.worker.link import Steps

NUMEL = 12


class Late:
    """A job in which each worker does so many steps, and then nothing more."""

    def __init__(self, steps: list[int], servers: int = 1, **options: Any) -> None:
        windows = options.pop("windows", False)
        self.job = SimulatedJob(len(steps), servers, optimizer=sgd, windows=windows, **options)
        self.workers: dict[int, sc.ps.Worker] = {}
        tasks = [self._train(rank, n) for rank, n in enumerate(steps) if n >= 0]
        for _ in range(60):
            self.turn(tasks)

    def turn(self, tasks: list[Steps[None]]) -> None:
        for task in tasks:
            next(task, None)
        self.job.serve()

    def _train(self, rank: int, steps: int) -> Steps[None]:
        model = Flat(NUMEL)
        self.workers[rank] = worker = sc.ps.Worker(model, sc.Dense(), link=self.job.links[rank], overlap=False)
        yield from worker.connecting()
        for _ in range(steps):
            model.weight.grad = torch.ones(NUMEL, dtype=torch.float32)
            yield from worker.stepping()

    def server(self, index: int = 0) -> str:
        return waits_for(self.job.servers[index])

    def worker(self, rank: int) -> str:
        worker = self.workers[rank]
        asking = worker.blaming()
        for _ in range(10):
            self.turn([asking])
        return worker.blamed


@pytest.mark.parametrize(
    ("mode", "steps", "text"),
    [
        (sc.ps.Synchronous(), [5, 3, 5], "push 4 of worker at rank 1"),
        (sc.ps.Synchronous(), [5, 3, 3], "push 4 of workers at rank 1, 2"),
        (sc.ps.Synchronous(), [5, 0, 2], "push 1 of worker at rank 1"),
        (sc.ps.Synchronous(), [5, -1, 2], "push 1 of worker at rank 1"),
        (sc.ps.Synchronous(), [-1, -1, 2], "push 1 of workers at rank 0, 1"),
        (sc.ps.Synchronous(), [2, 2, 2], "messages of workers at rank 0, 1, 2"),
        (sc.ps.Synchronous(), [-1, -1, -1], "HELLO of workers at rank 0, 1, 2"),
        (sc.ps.StaleSynchronous(2), [9, 3, 4], "push 4 of worker at rank 1"),
        (sc.ps.Asynchronous(), [9, 3, 4], "messages of workers at rank 0, 1, 2"),
    ],
    ids=str,
)
def test_a_server_names_the_workers_that_are_behind(mode: sc.ps.Mode, steps: list[int], text: str) -> None:
    late = Late(steps, mode=mode)
    assert late.server() == text
    if text.startswith("push"):
        fastest = max(range(3), key=lambda w: steps[w])
        assert late.worker(fastest) == f"server rank 3 waits for {text}"


def test_readers_of_windows_learn_it_as_well() -> None:
    late = Late([5, 3], windows=True)
    assert late.worker(0) == "server rank 2 waits for push 4 of worker at rank 1"
    assert late.server() == "push 4 of worker at rank 1"


def test_windows_are_not_open_before_all_have_come() -> None:
    late = Late([5, -1], windows=True)
    assert late.worker(0) == "server rank 2 waits for HELLO of worker at rank 1"


def test_the_worker_that_owes_the_first_values() -> None:
    job = SimulatedJob(2, 1, optimizer=sgd)
    job.mailboxes.tamper = lambda source, _, message: None if int(message[5]) == Kind.INIT else message
    workers = [sc.ps.Worker(Flat(NUMEL), link=link) for link in job.links]
    steps = [worker.connecting() for worker in workers]
    for _ in range(10):
        for each in steps:
            next(each)
        job.serve()
    assert waits_for(job.servers[0]) == "the first values from worker rank 0"


@pytest.mark.parametrize("kind", [Kind.SNAPSHOT, Kind.EVENT])
def test_a_backup_that_does_not_store(kind: Kind) -> None:
    """The workers wait for their own server, and this one for the other."""
    late = Late.__new__(Late)
    late.job, late.workers = SimulatedJob(1, 2, optimizer=sgd), {}
    late.job.mailboxes.tamper = lambda source, dest, message: (
        None if (source, int(message[5])) == (1, kind) else message
    )
    task = late._train(0, 3)
    for _ in range(30):
        late.turn([task])
    assert late.server() == "server rank 2 to store updates"
    assert "server rank 1 waits for server rank 2 to store updates" in late.worker(0)


def test_a_server_that_does_not_answer_is_late_itself() -> None:
    late = Late([2, 2], servers=2)
    late.job.servers[1].turn = lambda: False  # type: ignore[method-assign]
    said = late.worker(0)
    assert "server rank 2 waits for messages of workers at rank 0, 1" in said
    assert "server rank 3 does not answer" in said


def test_servers_wait_for_other_servers_at_the_end() -> None:
    job = SimulatedJob(1, 2, optimizer=sgd)
    worker = sc.ps.Worker(Flat(NUMEL), link=job.links[0])

    def steps() -> Steps[None]:
        yield from worker.connecting()
        yield from worker.leaving()

    job.mailboxes.tamper = lambda _, dest, message: None if int(message[5]) == Kind.DONE else message
    job.run([steps()])
    job.serve()
    assert waits_for(job.servers[0]) == "server at rank 2 to end"


def test_the_error_of_a_worker() -> None:
    late = Late([5, 3])
    worker, mailbox = late.workers[0], late.job.links[0].mailbox

    class Serving:
        """The worker's mailbox, whose servers take a turn whenever it is read."""

        def __getattr__(self, name: str) -> Any:
            return getattr(mailbox, name)

        def receive(self) -> Any:
            late.job.serve()
            return mailbox.receive()

    object.__setattr__(worker.link, "mailbox", Serving())
    drive = _Driver(Serving(), 0.2, [worker])  # type: ignore[arg-type]
    text = (
        "worker rank 0 has waited 0.2 s for the answer of server rank 2 to PULL of shard 0; "
        "server rank 2 waits for push 4 of worker at rank 1"
    )
    with pytest.raises(CommTimeout, match=text):
        drive(worker.pulling())
