"""The predictions, trials and decisions of `collective="auto"` for given costs of a link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import sparsecomm as sc
from sparsecomm.collectives import rings
from sparsecomm.ddp.choice import sums_gradients
from sparsecomm.exchange.auto import Candidate, Chooser, candidates, chooser
from sparsecomm.exchange.auto.chooser import MOST_OPTIONS, ROUNDS, TURN, TURNS, WATCHED
from sparsecomm.exchange.auto.predict import predict
from sparsecomm.exchange.costs import Costs
from sparsecomm.transport import Channel, CollectiveSteps, SoloTransport
from sparsecomm.types import Sizes, ValueCodec

MILLION = 1_000_000
LONG = WATCHED + MOST_OPTIONS * TURN * TURNS * ROUNDS + 5
"""Number of steps after which every trial has ended."""
KERNELS = {"exchange": 1e-4, "select": 0.4e-9, "fill": 0.1e-9, "encode": 3e-9, "decode": 3e-9, "add": 0.2e-9}
GIGABIT = Costs(alpha=1e-4, beta=8e-9, **KERNELS)
MEMORY = Costs(alpha=2e-5, beta=0.1e-9, **KERNELS)


def alone(label: str, make: Callable[[Channel], CollectiveSteps[Any]]) -> Any:
    """Runs a collective among one rank."""
    steps: Iterator[Any] = make(Channel(SoloTransport(), 0))
    try:
        while True:
            assert not next(steps), "nothing to wait for"
    except StopIteration as stop:
        return stop.value


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(chooser, "perf_counter", made)
    return made


def made(costs: Costs, density: float = 0.01, size: int = 4, *, native: bool = False, **options: Any) -> Chooser:
    chooser = Chooser(sc.SparseConfig(compressor=sc.TopK(density), **options), size, native=native)
    chooser.costs = costs
    return chooser


def run(
    chooser: Chooser, clock: Clock, steps: range, seconds: Callable[[str], float], k: int = 10_000
) -> list[Candidate]:
    """Runs steps of one bucket of a million elements. `seconds` maps the chosen candidate to the time of a step."""
    chosen = []
    for step in steps:
        chooser.begin(step, alone)
        how = chooser.choose(0, MILLION, k)
        clock.now += seconds(how.name)
        chooser.handed_over()
        chosen.append(how)
    return chosen


def test_a_slow_link_takes_few_bytes_and_a_fast_one_no_compression(clock: Clock) -> None:
    slow, fast = made(GIGABIT), made(MEMORY, density=0.25)
    chosen = run(slow, clock, range(LONG), lambda name: 1.0)
    assert chosen[-1].method == "allgather"
    assert slow.chosen is not None
    assert slow.chosen.name == "allgather"
    chosen = run(fast, clock, range(LONG), lambda name: 1.0, k=250_000)
    assert chosen[-1].method == "dense"


def test_many_ranks_take_the_exchange_that_does_not_grow_with_them() -> None:
    config = sc.SparseConfig(compressor=sc.TopK(0.01))

    def seconds(name: str, size: int) -> float:
        (candidate,) = (c for c in candidates(config) if c.name == name)
        return predict(
            candidate, Sizes(MILLION // 4, 25 * MILLION, size, candidate.values, config.indices), GIGABIT
        ).seconds

    assert seconds("allgather", 2) < seconds("split_reduce", 2)
    assert seconds("split_reduce", 64) < seconds("allgather", 64) / 4
    assert seconds("dense fp16", 4) < seconds("dense fp32", 4)


def test_two_levels_compete_only_where_nodes_have_several_ranks_and_win_on_a_slow_link_between_fast_nodes() -> None:
    config = sc.SparseConfig(compressor=sc.TopK(0.01))
    names = {c.method for c in candidates(config)}
    (two,) = (c for c in candidates(config, layered=True) if c.method not in names)
    assert two.name == "two_level"
    flat = Costs(alpha=1e-4, beta=8 * 8e-9, **KERNELS)  # eight ranks share a gigabit
    nodes = Costs(alpha=1e-4, beta=8 * 8e-9, **KERNELS, nodes=4, beside=8, inner_alpha=1e-5, inner_beta=0.05e-9)
    assert nodes.layered
    assert not flat.layered

    def seconds(name: str, costs: Costs) -> float:
        (candidate,) = (c for c in candidates(config, layered=True) if c.name == name)
        return predict(
            candidate, Sizes(MILLION // 25, 4 * MILLION, 32, candidate.values, config.indices), costs
        ).seconds

    others = [c.name for c in candidates(config)]
    assert seconds("two_level", nodes) < min(seconds(name, nodes) for name in others)
    slow_inside = replace(nodes, inner_beta=8 * 8e-9)
    assert seconds("two_level", slow_inside) > seconds("allgather", slow_inside)


def test_rings_cross_between_nodes_where_they_can() -> None:
    ring, inside = rings((0, 0, 2, 2, 2))
    assert ring == [0, 2, 1, 3, 4]
    assert inside == {0: [0, 1], 2: [2, 3, 4]}
    assert rings((0, 1, 2, 3))[0] == [0, 1, 2, 3]


def test_real_steps_overrule_the_prediction_and_everybody_knows_when(clock: Clock) -> None:
    chooser = made(GIGABIT)
    first = run(chooser, clock, range(WATCHED + 1), lambda name: 1.0)[-1]
    assert first.name == chooser.options[0].name, "the best prediction is tried first"
    assert len(chooser.options) > 1
    other = chooser.options[1].name
    trial = len(chooser.options) * TURN * TURNS
    chosen = run(chooser, clock, range(WATCHED + 1, WATCHED + trial + 9), lambda name: 0.5 if name == other else 1.0)
    assert chosen[-1].name == other
    assert chooser.decided_at == WATCHED + trial
    assert chooser.chosen is not None
    assert chooser.chosen.measured == pytest.approx(0.5)


@pytest.mark.parametrize(("sparse", "wanted"), [(1.0, "dense fp32"), (0.985, "dense fp32"), (0.97, "allgather")])
def test_what_is_not_clearly_faster_than_no_compression_is_not_worth_a_residual(
    clock: Clock, sparse: float, wanted: str
) -> None:
    chooser = made(replace(MEMORY, alpha=1e-6, beta=0.2e-9))
    run(chooser, clock, range(LONG), lambda name: {"dense fp32": 1.0, "allgather": sparse}.get(name, 1.1))
    assert chooser.options[0].name == "allgather", "the prediction"
    assert chooser.chosen is not None
    assert chooser.chosen.name == wanted
    reason = "nothing was 2% faster" if wanted == "dense fp32" and sparse < 1.0 else ""
    assert reason in chooser.explain()


@pytest.mark.parametrize("fastest", ["native", "dense fp32"])
def test_plain_ddp_is_tried_beside_our_own_sum(clock: Clock, fastest: str) -> None:
    chooser = made(replace(MEMORY, alpha=1e-6, beta=0.2e-9), native=True)
    run(chooser, clock, range(LONG), lambda name: {fastest: 1.0}.get(name, 1.01))
    assert {"native", "dense fp32"} <= {o.name for o in chooser.options}
    assert len(chooser.options) <= MOST_OPTIONS
    assert chooser.chosen is not None
    assert chooser.chosen.name == fastest
    assert chooser.chosen.is_plain


def test_plain_ddp_is_no_candidate_where_updates_are_summed() -> None:
    assert "native" not in {c.name for c in candidates(sc.preset("adamw"))}
    assert not sums_gradients(sc.preset("adamw"))
    assert not sums_gradients(sc.preset("dgc"))
    assert sums_gradients(sc.SparseConfig())


def test_a_tie_stays_with_the_prediction(clock: Clock) -> None:
    chooser = made(GIGABIT)
    best = run(chooser, clock, range(WATCHED + 1), lambda name: 1.0)[-1].name
    run(chooser, clock, range(WATCHED + 1, LONG), lambda name: 1.0 if name == best else 0.99)
    assert chooser.decided_at is not None
    assert chooser.chosen is chooser.options[0]


def test_what_is_near_is_tried_again_and_what_is_clearly_slower_is_not(clock: Clock) -> None:
    chooser = made(GIGABIT)
    run(chooser, clock, range(WATCHED + 1), lambda name: 1.0)
    names = [o.name for o in chooser.options]
    assert len(names) > 2
    seconds = dict.fromkeys(names, 2.0) | {names[0]: 1.0, names[1]: 1.03}
    chosen = run(chooser, clock, range(WATCHED + 1, LONG), lambda name: seconds[name])
    tried = [c.name for c in chosen[: chooser.decided_at - WATCHED - 1]]
    assert [tried.count(n) for n in names[2:]] == [TURN * TURNS] * (len(names) - 2)
    assert tried.count(names[1]) == ROUNDS * TURN * TURNS, "3% is not told apart by a few steps"
    assert chosen[-1].name == names[0]


def test_what_was_dropped_while_the_machine_was_fast_does_not_win_when_it_has_become_slow(clock: Clock) -> None:
    chooser = made(GIGABIT)
    run(chooser, clock, range(WATCHED + 1), lambda name: 1.0)
    names = [o.name for o in chooser.options]
    base = dict.fromkeys(names, 1.5) | {names[0]: 1.0, names[1]: 0.9}
    fast = WATCHED + 1 + len(names) * TURN * TURNS
    for step in range(WATCHED + 1, LONG):
        run(chooser, clock, range(step, step + 1), lambda name, s=step: base[name] * (1 if s < fast else 4))
    assert chooser.chosen is not None
    assert chooser.chosen.name == names[1]


def test_one_slow_step_does_not_decide(clock: Clock) -> None:
    chooser = made(GIGABIT)
    best = run(chooser, clock, range(WATCHED + 1), lambda name: 1.0)[-1].name
    for step in range(WATCHED + 1, LONG):
        run(chooser, clock, range(step, step + 1), lambda name, s=step: 30.0 if s == WATCHED + 3 else 1.0)
    assert chooser.chosen is not None
    assert chooser.chosen.name == best


def test_it_decides_again_when_the_density_has_moved(clock: Clock) -> None:
    chooser = made(GIGABIT)
    run(chooser, clock, range(LONG), lambda name: 1.0, k=10_000)
    decided = chooser.decided_at
    run(chooser, clock, range(LONG, 2 * LONG), lambda name: 1.0, k=15_000)
    assert chooser.decided_at == decided, "half as much again is not worth a trial"
    run(chooser, clock, range(2 * LONG, 3 * LONG), lambda name: 1.0, k=MILLION)
    assert chooser.decided_at is not None
    assert chooser.decided_at > 2 * LONG
    assert chooser.chosen is not None
    assert chooser.chosen.name.startswith("dense")


def test_a_bucket_of_its_own_kind_gets_its_own_answer(clock: Clock) -> None:
    chooser = made(GIGABIT, density=0.2)
    for step in range(WATCHED + 1):
        chooser.begin(step, alone)
        chooser.choose(0, 10 * MILLION, 10_000)
        chooser.choose(1, 10 * MILLION, 10 * MILLION)
        chooser.handed_over()
    assert chooser.options[0].name == "the best of each bucket"
    assert chooser.options[0].of(0).name == "allgather"
    assert chooser.options[0].of(1).method == "dense"


def test_16_bits_compete_only_where_their_rounding_is_kept() -> None:
    def dense(**options: Any) -> set[ValueCodec]:
        config = sc.SparseConfig(compressor=sc.TopK(0.01), **options)
        return {c.values for c in candidates(config) if c.method == "dense"}

    assert dense() == {ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16}
    assert dense(feedback=None) == {ValueCodec.FP32}
    assert dense(value_codec="fp32") == {ValueCodec.FP32}
    assert dense(value_codec="bf16") == {ValueCodec.BF16}


def test_measuring_gives_positive_figures_and_the_table_shows_them(clock: Clock) -> None:
    chooser = Chooser(sc.SparseConfig(compressor=sc.ThresholdTopK(0.01)), 4)
    assert "nothing is measured yet" in chooser.explain()
    run(chooser, clock, range(WATCHED + 1), lambda name: 1.0)
    costs = chooser.costs
    assert costs is not None
    assert min(costs.exchange, costs.select, costs.fill, costs.encode, costs.add) > 0
    assert "not decided yet" in chooser.explain() or chooser.decided_at is not None
    run(chooser, clock, range(WATCHED + 1, LONG), lambda name: 1.0)
    chooser.finished(0, chooser.choose(0, MILLION, 10_000), 0.0123)
    text = chooser.explain()
    assert "12.300" in text
    assert "chosen at step" in text
    assert all(c.name in text for c in candidates(chooser.config))
