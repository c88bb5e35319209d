"""Hints on an optimizer that does not fit the feedback, and on a run that ends in its warm-up."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import JOBS, Job, mpirun_command, run_job
from torch.optim.optimizer import _global_optimizer_post_hooks

import sparsecomm as sc
from sparsecomm.ddp import hints
from sparsecomm.ddp.fit import INSTEAD_OF_ADAM, INSTEAD_OF_MOMENTUM
from sparsecomm.ddp.hints import Run, warmup_hint
from sparsecomm.exchange.config import SparseConfig

Make = Callable[[Any], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    """A world of one, and a look at the end: no hook of ours may be left."""
    sc.init()
    before = dict(_global_optimizer_post_hooks)
    yield
    left = [key for key in _global_optimizer_post_hooks if key not in before]
    for key in left:
        del _global_optimizer_post_hooks[key]
    assert left == []


class Training:
    """A model whose gradients go through a state.

    Attributes:
        state: sparse from the first step on, unless the options say otherwise.
    """

    def __init__(self, feedback: object = None, compressor: sc.Compressor | None = None, **options: Any) -> None:
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 5, dtype=torch.float32), torch.nn.Linear(5, 2, dtype=torch.float32)
        )
        compressor = sc.TopK(0.1) if compressor is None else compressor
        options = {"feedback": feedback, "collective": "allgather", **options}
        self.state = sc.SparseState(compressor, model=self.model, **options)

    def backward(self, scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss) -> None:
        """One backward pass and its exchange."""
        self.model.zero_grad()
        scale(self.model(torch.randn(4, 6, dtype=torch.float32)).square().mean()).backward()
        sc.allreduce_gradients(self.model, self.state)

    def step(self, *optimizers: torch.optim.Optimizer) -> None:
        """One training step."""
        self.backward()
        for optimizer in optimizers:
            optimizer.step()


def hint_of(training: Training, *optimizers: torch.optim.Optimizer) -> str:
    """The only warning of three steps; it comes in the first."""
    with pytest.warns(sc.ConvergenceWarning) as caught:
        training.step(*optimizers)
    for _ in range(2):
        training.step(*optimizers)  # any warning is an error here
    assert len(caught) == 1
    return str(caught[0].message)


class Lamb(torch.optim.Optimizer):
    """Another package's adaptive optimizer: only its state tells."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)


ADAPTIVE: dict[str, Make] = {
    **{name: getattr(torch.optim, name) for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop")},
    **{name: getattr(torch.optim, name) for name in ("Adagrad", "Adadelta", "Adafactor")},
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, foreach=True),
    "another package's": Lamb,
}
PLAIN: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
}
MOMENTUM: dict[str, Make] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "SGD with Nesterov's": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
}
CORRECTIONS = [sc.MomentumCorrection(), sc.AdamCorrection()]
each_correction = pytest.mark.parametrize("feedback", CORRECTIONS, ids=lambda f: type(f).__name__)


# --- combinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [sc.ErrorFeedback(), None], ids=["ErrorFeedback", "None"])
@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE)
def test_an_adaptive_optimizer_after_sparse_gradients(make: Make, feedback: object) -> None:
    training = Training(feedback)
    optimizer = make(training.model.parameters())
    said = hint_of(training, optimizer)
    assert said.startswith(f"{type(optimizer).__name__} divides by a second moment")
    assert "up to 29% above" in said
    assert INSTEAD_OF_ADAM in said


@each_correction
@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE)
def test_an_adaptive_optimizer_after_a_correction(make: Make, feedback: object) -> None:
    training = Training(feedback)
    said = hint_of(training, make(training.model.parameters()))
    assert f"keeps moments of its own after {type(feedback).__name__}" in said
    assert INSTEAD_OF_MOMENTUM in said


@each_correction
@pytest.mark.parametrize("make", MOMENTUM.values(), ids=MOMENTUM)
def test_momentum_after_a_correction(make: Make, feedback: object) -> None:
    training = Training(feedback)
    said = hint_of(training, make(training.model.parameters()))
    assert said.startswith(f"SGD keeps momentum of its own after {type(feedback).__name__}")
    assert INSTEAD_OF_MOMENTUM in said


@pytest.mark.parametrize("feedback", [sc.ErrorFeedback(), None, *CORRECTIONS], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_nothing_is_said_to_an_optimizer_without_moments(make: Make, feedback: object) -> None:
    training = Training(feedback)
    optimizer = make(training.model.parameters())
    for _ in range(3):
        training.step(optimizer)


@pytest.mark.parametrize("make", MOMENTUM.values(), ids=MOMENTUM)
def test_nothing_is_said_to_momentum_after_error_feedback(make: Make) -> None:
    training = Training(sc.ErrorFeedback())
    optimizer = make(training.model.parameters())
    for _ in range(3):
        training.step(optimizer)


@pytest.mark.parametrize(
    ("compressor", "options"),
    [
        (sc.TopK(1.0), {}),
        (sc.Dense(), {}),
        (sc.TopK(0.1), {"collective": "dense"}),
        (sc.TopK(0.1), {"dense_below": 1000}),
        (sc.Sign(), {"collective": "sign"}),
    ],
    ids=["density 1", "Dense", "collective dense", "small buckets", "no sparse average"],
)
def test_nothing_is_said_where_the_average_is_dense(compressor: sc.Compressor, options: dict[str, Any]) -> None:
    training = Training(sc.ErrorFeedback(), compressor, **options)
    optimizer = torch.optim.AdamW(training.model.parameters())
    for _ in range(3):
        training.step(optimizer)


def test_nothing_is_said_to_an_optimizer_that_is_made_for_sparse_averages() -> None:
    training = Training(sc.ErrorFeedback())
    optimizer = torch.optim.AdamW(training.model.parameters())
    optimizer.fits_sparse_averages = True  # type: ignore[attr-defined]
    for _ in range(3):
        training.step(optimizer)


# --- when, and how often --------------------------------------------------------------------------------------------


def test_dense_steps_at_the_start_put_it_off() -> None:
    training = Training(sc.ErrorFeedback(), dense_steps=2)
    optimizer = torch.optim.AdamW(training.model.parameters())
    training.step(optimizer)
    training.step(optimizer)
    assert "AdamW" in hint_of(training, optimizer)


def test_another_feedback_is_looked_at_again_but_said_once() -> None:
    training = Training(sc.ErrorFeedback())
    optimizer = torch.optim.SGD(training.model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        training.step(optimizer)
    training.state.update(feedback=sc.MomentumCorrection())
    assert "after MomentumCorrection" in hint_of(training, optimizer)
    training.state.update(density=0.2)
    training.step(optimizer)
    training.state.update(feedback=sc.MomentumCorrection(momentum=0.5))
    for _ in range(2):
        training.step(optimizer)


def test_it_points_to_the_script_and_can_be_silenced() -> None:
    training = Training(sc.ErrorFeedback())
    optimizer = torch.optim.AdamW(training.model.parameters())
    training.backward()
    with pytest.warns(sc.ConvergenceWarning) as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    training.backward()
    silenced = Training(sc.ErrorFeedback())
    other = torch.optim.AdamW(silenced.model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=sc.ConvergenceWarning)
        silenced.step(other)
    silenced.step(other)


def test_as_an_error_it_leaves_the_state_in_order() -> None:
    training = Training(sc.ErrorFeedback())
    optimizer = torch.optim.AdamW(training.model.parameters())
    with pytest.raises(sc.ConvergenceWarning, match="AdamW"):
        training.step(optimizer)
    training.step(optimizer)


# --- which optimizer ------------------------------------------------------------------------------------------------


def test_the_hook_is_there_until_our_optimizer_has_stepped() -> None:
    before = len(_global_optimizer_post_hooks)
    training = Training(sc.ErrorFeedback())
    ours = torch.optim.SGD(training.model.parameters(), 0.1)
    critic = torch.nn.Linear(3, 1, dtype=torch.float32)
    theirs = torch.optim.Adam(critic.parameters())
    for _ in range(3):
        training.backward()
        critic(torch.ones(1, 3, dtype=torch.float32)).sum().backward()
        theirs.step()  # of a GAN's other half nothing is said
        assert len(_global_optimizer_post_hooks) == before + 1
    training.step(ours)
    training.backward()
    assert len(_global_optimizer_post_hooks) == before
    assert not training.state._parts.hints.due


def test_all_optimizers_of_a_step_are_seen() -> None:
    training = Training(sc.ErrorFeedback())
    first = torch.optim.SGD(training.model[0].parameters(), 0.1, momentum=0.9)
    second = torch.optim.AdamW(training.model[1].parameters())
    assert hint_of(training, first, second).startswith("AdamW")


def test_the_search_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "_PATIENCE", 3)
    before = len(_global_optimizer_post_hooks)
    training = Training(sc.ErrorFeedback())
    critic = torch.nn.Linear(3, 1, dtype=torch.float32)
    theirs = torch.optim.Adam(critic.parameters())
    critic(torch.ones(1, 3, dtype=torch.float32)).sum().backward()
    for _ in range(4):
        training.step(theirs)
    assert len(_global_optimizer_post_hooks) == before


def test_a_dropped_state_says_nothing_any_more() -> None:
    before = dict(_global_optimizer_post_hooks)
    training = Training(sc.ErrorFeedback())
    optimizer = torch.optim.AdamW(training.model.parameters())
    training.backward()
    del training.state
    gc.collect()
    optimizer.step()
    for key in set(_global_optimizer_post_hooks) - set(before):
        del _global_optimizer_post_hooks[key]  # nothing can take it away safely: torch may be iterating over it


def test_steps_of_a_grad_scaler_are_seen_also_after_a_skipped_one() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    training = Training(sc.ErrorFeedback(), scaler=scaler)
    optimizer = torch.optim.AdamW(training.model.parameters())
    for factor in (float("inf"), 1.0, 1.0):
        training.backward(lambda loss, factor=factor: scaler.scale(loss * factor))
        if factor == 1.0 and not optimizer.state:
            with pytest.warns(sc.ConvergenceWarning, match="AdamW"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()


def test_a_scheduler_changes_nothing() -> None:
    training = Training(sc.ErrorFeedback())
    optimizer = torch.optim.AdamW(training.model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    hint_of(training, optimizer)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_optimizer_inside_a_zero_redundancy_optimizer_is_seen() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    training = Training(sc.ErrorFeedback())
    sharded = ZeroRedundancyOptimizer(training.model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2)
    assert hint_of(training, sharded).startswith("AdamW")


def test_the_optimizer_inside_a_wrapper_is_seen() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As in accelerate: an optimizer by type alone."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    training = Training(sc.ErrorFeedback())
    assert hint_of(training, Wrapper(torch.optim.AdamW(training.model.parameters()))).startswith("AdamW")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_left_alone() -> None:
    training = Training(sc.ErrorFeedback())
    optimizer = torch.optim.AdamW(training.model.parameters())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda: optimizer.step(), backend=backend)
    training.backward()
    compiled()
    first = len(graphs)
    training.step(optimizer)  # not compiled, seen
    training.backward()
    compiled()
    assert len(graphs) == first, "the hook's end compiles nothing again"


# --- which rank -----------------------------------------------------------------------------------------------------


def test_other_ranks_do_not_look() -> None:
    before = len(_global_optimizer_post_hooks)
    training = Training(sc.ErrorFeedback())
    model = training.state._lookup.attach(training.state, sc.world())
    silent = hints.Hints(training.state.config)
    silent.at_bucket(replace(model, rank=1, size=2), sparse=True)
    assert not silent.due
    assert len(_global_optimizer_post_hooks) == before


def job(*flags: str) -> Job:
    return run_job([*mpirun_command(2), sys.executable, *flags, JOBS / "hints.py"], deadline=90.0)


@pytest.mark.slow
def test_rank_0_alone_speaks_in_the_first_steps_and_at_the_end() -> None:
    done = job()
    assert done.code == 0, done
    lines = done.err.splitlines()
    assert len(lines) == 2, done
    assert lines[0].startswith("rank 0 in hints.py: ConvergenceWarning: AdamW divides by a second moment"), done
    assert lines[1].startswith("rank 0 in sys: ConvergenceWarning: the run ended after 5 steps, but"), done


@pytest.mark.slow
def test_a_filter_silences_a_job() -> None:
    done = job("-W", "ignore::UserWarning")
    assert (done.code, done.err) == (0, ""), done


# --- the end of the run ---------------------------------------------------------------------------------------------


def run(density: object, step: int) -> Run:
    return Run(SparseConfig(compressor=sc.TopK(density)), step)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [sc.Geometric(0.25, 0.01, 20), sc.Warmup((0.5, 0.1), 10, 0.01)])
def test_a_run_shorter_than_its_warm_up(schedule: Any) -> None:
    assert schedule(19) > schedule(20) == schedule.final
    said = warmup_hint(run(schedule, 19))
    assert said is not None
    assert said.startswith("the run ended after 19 steps, but its density is final from step 20 on")
    assert warmup_hint(run(schedule, 20)) is None


@pytest.mark.parametrize("density", [0.01, sc.Constant(0.01), lambda step: 0.5 / (step + 1)])
def test_nothing_is_said_at_the_end_without_a_known_warm_up(density: object) -> None:
    assert warmup_hint(run(density, 3)) is None
    assert warmup_hint(Run(SparseConfig(compressor=sc.Dense()), 3)) is None


def test_the_state_keeps_its_run_up_to_date() -> None:
    training = Training(sc.ErrorFeedback(), sc.TopK(sc.Geometric(0.25, 0.1, 9)))
    optimizer = torch.optim.SGD(training.model.parameters(), 0.1)
    for _ in range(3):
        training.step(optimizer)
    seen = training.state._parts.hints.run
    assert seen.step == training.state.step == 3
    training.state.update(density=0.1)
    assert seen.config is training.state.config
