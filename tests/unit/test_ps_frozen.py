"""Parameters without a gradient: servers leave them alone, as torch's optimizers do, in every mode and after deaths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_job import SimulatedJob

import sparsecomm as sc
from sparsecomm.errors import WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.gradient import marks, read_gradient
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.payloads import PUSH, Origin, encode
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.shard import Shard
from sparsecomm.ps.worker.link import Link, Steps
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Codecs, ValueCodec

STEPS, FREEZE, MELT = 12, 4, 8
MODES = [sc.ps.Synchronous(), sc.ps.StaleSynchronous(1), sc.ps.Asynchronous()]
SHAPES = {"first": (5, 3), "second": (7,), "third": (2, 6)}
NAMES = list(SHAPES)
Has = Callable[[int, int, str], bool]
"""Whether a worker has a gradient in a step, by the parameter's name."""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float32)))


def gradient(worker: int, step: int, name: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * worker + 10 * step + NAMES.index(name))
    return torch.randn(SHAPES[name], generator=g, dtype=torch.float32)


def set_gradients(model: torch.nn.Module, worker: int, step: int, has: Has) -> None:
    for name, p in model.named_parameters():
        p.grad = gradient(worker, step, name) if has(worker, step, name) else None


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.1)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01)


def frozen(worker: int, step: int, name: str) -> bool:
    return name != "first" or not FREEZE <= step < MELT


def frozen_for_good(worker: int, step: int, name: str) -> bool:
    return name != "second" or step < FREEZE


def unused_on_some(worker: int, step: int, name: str) -> bool:
    return not (worker == 0 and name == "second" and step % 3 == 1) and (name != "third" or step != 6)


def nothing_at_all(worker: int, step: int, name: str) -> bool:
    return step not in (3, 7)


def training(link: Link, has: Has, compressor: Any, seen: list[torch.Tensor], **options: Any) -> Steps[sc.ps.Worker]:
    model = Net()
    worker = sc.ps.Worker(model, compressor, link=link, **options)
    yield from worker.connecting()
    for step in range(STEPS):
        set_gradients(model, worker.rank, step, has)
        yield from worker.stepping()
        seen.append(flat(model))
    yield from worker.leaving()
    return worker


def run(job: SimulatedJob, has: Has, compressor: Any = None, **options: Any) -> tuple[Any, list[list[torch.Tensor]]]:
    """Returns the workers, and the parameters that each had after every step."""
    between = options.pop("between", None)
    seen: list[list[torch.Tensor]] = [[] for _ in job.links]
    tasks = [
        training(link, has, compressor or sc.Dense(), s, **options) for link, s in zip(job.links, seen, strict=True)
    ]
    out = job.run(tasks, between=between)
    for each in out:
        if isinstance(each, BaseException):
            raise each
    return out, seen


def alone(workers: int, has: Has, make: Any) -> list[torch.Tensor]:
    """Trains without servers: gradients are averaged over all workers, and are None where nobody has one."""
    model, seen = Net(), []
    optimizer = make(model.parameters())
    for step in range(STEPS):
        for name, p in model.named_parameters():
            given = [gradient(w, step, name) for w in range(workers) if has(w, step, name)]
            p.grad = torch.stack(given).sum(0) / workers if given else None
        optimizer.step()
        seen.append(flat(model))
    return seen


@pytest.mark.parametrize("make", [adamw, momentum])
@pytest.mark.parametrize("has", [frozen, frozen_for_good, unused_on_some, nothing_at_all])
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 3), (3, 2)])
def test_synchronous_training_is_that_of_torch(workers: int, servers: int, has: Has, make: Any) -> None:
    """With three servers the cuts fall inside tensors, so that a parameter is frozen in two shards."""
    _, seen = run(SimulatedJob(workers, servers, optimizer=make), has)
    for mine in seen:
        for found, expected in zip(mine, alone(workers, has, make), strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("compressor", [sc.Dense(), sc.TopK(0.3), sc.TopK(1.0)], ids=["dense", "some", "all"])
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_a_frozen_parameter_does_not_move_and_its_residual_is_kept(
    mode: sc.ps.Mode, compressor: Any, codec: str
) -> None:
    job = SimulatedJob(2, 2, optimizer=momentum, mode=mode, replicate=False)
    seen: list[list[torch.Tensor]] = [[], []]
    kept: list[torch.Tensor] = []

    def task(link: Link, mine: list[torch.Tensor]) -> Steps[None]:
        model = Net()
        worker = sc.ps.Worker(model, compressor, link=link, value_codec=codec)
        yield from worker.connecting()
        for step in range(STEPS):
            if step == FREEZE:  # everybody stands at the same update
                while sum(s.version for server in job.servers for s in server.shards.values()) < 2 * FREEZE * (
                    1 if mode.rounds else 2
                ):
                    yield "the other worker"
                yield from worker.pulling()
            set_gradients(model, worker.rank, step, frozen_for_good)
            yield from worker.stepping()
            if step >= FREEZE - 1:
                mine.append(model.second.detach().clone())  # type: ignore[union-attr, operator]
                kept.append(worker.residual()[15:22])
        yield from worker.leaving()

    out = job.run([task(link, mine) for link, mine in zip(job.links, seen, strict=True)])
    assert out == [None, None]
    for mine in seen:
        assert all(torch.equal(values, mine[1]) for values in mine[1:])
    rounds = codec == "fp16" or (codec == "int8" and compressor != sc.Dense())  # int8 leaves dense values alone
    assert any(bool(r.any()) for r in kept) == (rounds or compressor == sc.TopK(0.3))
    half = len(kept) // 2
    assert len({tuple(r.tolist()) for r in kept}) <= 2, f"one residual of each worker, {half} times"


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_parameter_that_is_unfrozen_sends_its_residual(mode: sc.ps.Mode) -> None:
    """Everything that was ever computed has arrived or waits in a residual."""
    job = SimulatedJob(2, 2, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), mode=mode, replicate=False)
    out, _ = run(job, frozen, sc.TopK(0.2), value_codec="fp16")
    computed = torch.zeros(34, dtype=torch.float64)
    for worker in range(2):
        for step in range(STEPS):
            grads = [gradient(worker, step, n).reshape(-1) * frozen(worker, step, n) for n in NAMES]
            computed += torch.cat(grads).double()
    waiting = sum(worker.residual().double() for worker in out)
    final = torch.cat([s.values for server in job.servers for s in server.shards.values()])
    applied = (flat(Net()) - final).double() * 2
    assert torch.allclose(applied, computed - waiting, atol=1e-3)


@pytest.mark.parametrize("feedback", [sc.MomentumCorrection(0.9), sc.AdamCorrection()], ids=["momentum", "adam"])
def test_corrections_of_a_worker_rest_with_the_parameter(feedback: Any) -> None:
    job = SimulatedJob(1, 1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    moments = []

    def task(link: Link) -> Steps[None]:
        model = Net()
        worker = sc.ps.Worker(model, sc.TopK(0.3), feedback=feedback, link=link)
        yield from worker.connecting()
        for step in range(STEPS):
            set_gradients(model, 0, step, frozen_for_good)
            yield from worker.stepping()
            velocity = worker._parts[0].bucket.velocity
            assert velocity is not None
            moments.append(velocity[15:22].clone())
        yield from worker.leaving()

    assert job.run([task(job.links[0])]) == [None]
    assert moments[FREEZE].any()
    assert all(torch.equal(m, moments[FREEZE]) for m in moments[FREEZE:])


@pytest.mark.parametrize("victim", [2, 3, 4])
def test_copies_leave_it_alone_as_well(victim: int) -> None:
    expected, _ = alone(2, frozen, adamw), None
    for turn in range(2, 40, 3):
        job = SimulatedJob(2, 3, optimizer=adamw)

        def kill(now: int, job: SimulatedJob = job, turn: int = turn) -> None:
            if now == turn:
                job.mailboxes.kill(victim)

        _, seen = run(job, frozen, between=kill)
        for mine in seen:
            assert torch.allclose(mine[-1], expected[-1], rtol=1e-5, atol=1e-6)


def test_a_snapshot_has_the_marks_of_open_rounds() -> None:
    job = SimulatedJob(2, 1, optimizer=momentum)
    waiting: list[bytes] = []

    def look(turn: int) -> None:
        for shard in job.servers[0].shards.values():
            again = Shard.from_snapshot(job.rules, shard.snapshot())
            assert again._open_rounds.keys() == shard._open_rounds.keys()
            for clock, pushes in shard._open_rounds.items():
                for worker, kept in pushes.items():
                    copied = again._open_rounds[clock][worker]
                    assert (copied.absent, copied.nonfinite) == (kept.absent, kept.nonfinite)
                    waiting.append(bytes(kept.absent))

    def slow(link: Link) -> Steps[None]:
        for step in training(link, frozen, sc.Dense(), []):
            yield step
            yield "a pause"
            yield "a pause"

    job.run([training(job.links[0], frozen, sc.Dense(), []), slow(job.links[1])], between=look)
    assert bytes([0]) in waiting, "a push without the first parameter's gradient was waiting"


def test_a_push_that_is_not_finite_does_not_move_it_either() -> None:
    def has(worker: int, step: int, name: str) -> bool:
        return step < FREEZE or name != "first" or worker == 1

    job = SimulatedJob(2, 1, optimizer=momentum)

    def task(link: Link) -> Steps[torch.Tensor]:
        model = Net()
        worker = sc.ps.Worker(model, sc.Dense(), link=link)
        yield from worker.connecting()
        for step in range(FREEZE + 3):
            set_gradients(model, worker.rank, step, has)
            if worker.rank == 1 and step >= FREEZE:
                model.third.grad[0, 0] = float("nan")  # type: ignore[union-attr, index]
            before = model.first.detach().clone()  # type: ignore[union-attr, operator]
            yield from worker.stepping()
        yield from worker.leaving()
        return before - model.first.detach()  # type: ignore[union-attr, operator, no-any-return]

    for moved in job.run([task(link) for link in job.links]):
        assert not moved.any(), "the only gradient of it was left out"


def test_a_parameter_that_was_frozen_from_the_start_and_gets_a_gradient_is_an_error() -> None:
    job = SimulatedJob(1, 1, optimizer=momentum)

    def task(link: Link) -> Steps[None]:
        model = Net()
        model.second.requires_grad_(False)
        worker = sc.ps.Worker(model, sc.Dense(), link=link)
        yield from worker.connecting()
        model.second.requires_grad_(True)
        set_gradients(model, 0, 0, lambda *_: True)
        yield from worker.stepping()

    (error,) = job.run([task(job.links[0])])
    assert isinstance(error, sc.ConfigError)
    assert "parameter 'second' has a gradient, but no server has the parameter" in str(error)


# --- the bytes ---

SPEC = ModelLayout(tuple(f"p{i}" for i in range(11)), ((2,),) * 11).shard(0, 1)


def payload(values: dict[int, float]) -> torch.Tensor:
    at = sorted(values)
    pairs = (
        torch.tensor(at, dtype=torch.int64).to(torch.uint32),
        torch.tensor([values[i] for i in at], dtype=torch.float32),
    )
    return encode(Origin(PUSH, SPEC, 0, 2, 3), pairs, Codecs(ValueCodec.FP32, None), Arena())[0]


@pytest.mark.parametrize("absent", [(), (0,), (7, 8), (10,), tuple(range(11))])
def test_marks_pass_through_bytes(absent: tuple[int, ...]) -> None:
    marked = marks(absent, 11)
    assert marked.numel() == (2 if absent else 0)
    gradient = read_gradient(Origin(PUSH, SPEC, 0, 2, 3), marked.numel(), torch.cat((marked, payload({}))))
    assert gradient.absent == frozenset(absent)


@pytest.mark.parametrize(
    ("marked", "announced", "text"),
    [
        ([1], 1, "seq = 1: marks of 11 pieces have 2 bytes, or 0"),
        ([1, 0, 0], 3, "seq = 3: marks of 11 pieces"),
        ([0, 8], 2, "marks = '0x800': the shard has 11 pieces"),
        ([2, 0], 2, "marks = 1: 'p1' is marked as without a gradient and has values"),
        ([1, 0], 0, "magic"),
        ([], 2, "a header has 88 bytes|marks|magic"),
        ([], 1 << 60, "seq = "),
    ],
)
def test_marks_that_do_not_fit_are_refused(marked: list[int], announced: int, text: str) -> None:
    body = torch.cat((torch.tensor(marked, dtype=torch.uint8), payload({3: 1.0})))
    with pytest.raises(WireError, match=text) as caught:
        read_gradient(Origin(PUSH, SPEC, 0, 2, 3), announced, body)
    assert caught.value.rank == 0


def test_damage_to_marks_is_found() -> None:
    marked = marks((1,), 11)
    message = ms.pack(Envelope(Kind.PUSH, 0, 0, clock=3, seq=marked.numel()), torch.cat((marked, payload({}))))
    ms.unpack(message, 0)
    message[ms.ENVELOPE_BYTES] ^= 4
    with pytest.raises(WireError, match="body_crc"):
        ms.unpack(message, 0)
