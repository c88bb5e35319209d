"""What a review found, each as the run that showed it."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch
from helpers import Raising

import sparsecomm as sc
from sparsecomm.errors import TransportError
from sparsecomm.feedback import BucketLayout, BucketMemory, Incoming, MomentumCorrection
from sparsecomm.feedback.accumulate import take_some
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Engine, SimulatedWorld, SoloTransport, Task


@pytest.fixture
def engine() -> Any:
    made = Engine(SoloTransport(), timeout=20.0)
    yield made
    made.close()


def test_collectives_of_one_key_follow_each_other() -> None:
    """Two exchanges of one bucket would share buffers: the second starts when the first has ended."""
    world = SimulatedWorld(2)
    engines = [Engine(t, timeout=20.0) for t in world.ranks]
    log: list[str] = []
    ended: queue.SimpleQueue[object] = queue.SimpleQueue()

    def steps(name: str) -> Any:
        def make(channel: Channel) -> CollectiveSteps[None]:
            log.append(f"{name} starts")
            into = torch.empty(1, dtype=torch.uint8)
            yield [
                channel.isend(torch.zeros(1, dtype=torch.uint8), 1 - channel.rank),
                channel.irecv(into, 1 - channel.rank),
            ]
            log.append(f"{name} ends")

        return make

    for name in ("first", "second"):
        engines[0].submit(Task(name, steps(name), ended.put, ended.put, key="bucket 0"))
    quiet = [lambda _: None] * 2
    for name in ("first", "second"):
        engines[1].submit(Task(name, lambda c: steps("other")(c), *quiet, key="bucket 0"))
    for _ in range(2):
        assert ended.get(timeout=20) is None
    mine = [line for line in log if not line.startswith("other")]
    assert mine == ["first starts", "first ends", "second starts", "second ends"]
    assert all(e.close() for e in engines)


def test_an_exit_in_a_callback_does_not_silence_the_engine(engine: Engine) -> None:
    left = threading.Event()

    def leave(_: object) -> None:
        left.set()
        raise SystemExit(3)

    def nothing(channel: Channel) -> CollectiveSteps[None]:
        yield []

    engine.submit(Task("leaves", nothing, leave, leave))
    assert left.wait(20)
    with pytest.raises(TransportError, match="callback"):
        engine.call("later", nothing)


def test_a_callback_cannot_wait_for_its_own_thread(engine: Engine) -> None:
    told: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def nothing(channel: Channel) -> CollectiveSteps[None]:
        yield []

    def wait(_: object) -> None:
        try:
            engine.call("from the engine's thread", nothing)
        except TransportError as error:
            told.put(error)

    engine.submit(Task("outer", nothing, wait, wait))
    assert "own thread" in str(told.get(timeout=20))


def test_submitting_after_the_end_is_refused(engine: Engine) -> None:
    assert engine.close()
    with pytest.raises(TransportError, match="closed"):
        engine.submit(Task("late", lambda c: iter(()), print, print))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_selection_that_fails_leaves_velocity_and_held_residual_as_they_were(nesterov: bool) -> None:
    layout = BucketLayout(("w",), ((6,),), ((1,),))
    bucket = BucketMemory(
        0, layout, residual=torch.arange(6.0, dtype=torch.float32), velocity=torch.arange(6.0, dtype=torch.float32) / 7
    )
    before = bucket.residual.clone(), bucket.velocity.clone()  # type: ignore[union-attr]
    feedback = MomentumCorrection(momentum=0.5, nesterov=nesterov)
    grad = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.0, 5.0], dtype=torch.float32)
    with pytest.raises(ValueError, match="broken"):
        take_some(bucket, Incoming(grad, feedback, unused=((3, 5),)), Raising("broken"), 1, Arena())
    torch.testing.assert_close(bucket.residual, before[0])
    torch.testing.assert_close(bucket.velocity, before[1])


def run_steps(
    poisoned: int, scaler: torch.amp.GradScaler
) -> tuple[sc.SparseState, list[torch.Tensor], list[torch.Tensor]]:
    """Three steps of two buckets in a world of one; in step `poisoned` bucket 0 holds an infinity."""
    sc.init()
    parameters = [
        torch.nn.Parameter(torch.zeros(40, dtype=torch.float32)),
        torch.nn.Parameter(torch.zeros(50, dtype=torch.float32)),
    ]
    state = sc.SparseState(
        sc.TopK(density=0.2), model=torch.nn.ParameterList(parameters), scaler=scaler, collective="allgather"
    )
    generator = torch.Generator().manual_seed(3)
    applied = [torch.zeros(40, dtype=torch.float32), torch.zeros(50, dtype=torch.float32)]
    given = [torch.zeros(40, dtype=torch.float32), torch.zeros(50, dtype=torch.float32)]
    for step in range(3):
        grads = [torch.randn(p.numel(), generator=generator, dtype=torch.float32) for p in parameters]
        scaled = [g * float(scaler.get_scale()) for g in grads]
        if step == poisoned:
            scaled[0][5] = float("inf")
        futures = [state.start(i, [p], g, last=i == 1) for i, (p, g) in enumerate(zip(parameters, scaled, strict=True))]
        results = [f.wait() / float(scaler.get_scale()) for f in futures]
        if step == poisoned:
            assert bool(results[0].isnan().all())
            continue
        for i in range(2):
            applied[i] += results[i]
            given[i] += grads[i]
    return state, applied, given


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_an_overflow_in_one_bucket_loses_nothing_of_the_others(poisoned: int) -> None:
    """GradScaler skips the whole step: the finite bucket's residual must be what it was before it."""
    state, applied, given = run_steps(poisoned, torch.amp.GradScaler("cpu", init_scale=256.0))
    saved = state.state_dict()
    for i in range(2):
        torch.testing.assert_close(applied[i] + saved[f"residual.{i}"], given[i], rtol=1e-5, atol=1e-5)


def test_a_failed_bucket_leaves_nothing_in_flight_and_the_next_step_works() -> None:
    sc.init()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.float32), torch.nn.Linear(4, 4, dtype=torch.float32))
    state = sc.SparseState(sc.TopK(density=0.5), model=model)
    for step in range(6):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if step % 2:
            sc.allreduce_gradients(model, state, bucket_bytes=16)
            continue
        model[1].double()  # float64 gradients are refused
        for p in model[1].parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(sc.ConfigError, match="float64"):
            sc.allreduce_gradients(model, state, bucket_bytes=16)
        model[1].float()
        state = sc.SparseState(sc.TopK(density=0.5), model=model)
    assert threading.active_count() < 20
