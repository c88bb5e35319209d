"""float16 and bfloat16, autocast, and GradScaler with real overflows on one rank."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from ledger import Ledger, lossless, sparse
from torch import nn
from training import flat, grad_of, loss_of, mlp, wrap

import sparsecomm as sc

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
def test_half_precision_gradients_are_conserved_to_the_rounding_of_the_bucket(
    world: sc.World, dtype: torch.dtype, view: bool
) -> None:
    """The residual is float32; only the average is rounded, into the bucket, and that error is not fed back."""
    ledger = Ledger(mlp(dtype), sparse(), gradient_as_bucket_view=view)
    for step in range(6):
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s, dtype=dtype).backward(), step))
        ledger.check(rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        with torch.no_grad():
            for p in ledger.model.parameters():
                p -= 0.1 * p.grad
        ledger.check_replicas()
    assert all(t.dtype == torch.float32 for k, t in ledger.state.state_dict().items() if k.startswith("residual."))


class Mixed(nn.Module):
    """A bfloat16 body and a float32 head: DDP makes buckets of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Linear(12, 16, dtype=torch.bfloat16)
        self.head = nn.Linear(16, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.to(torch.bfloat16)).tanh().float())


def test_models_of_mixed_dtypes(world: sc.World) -> None:
    ours, plain, ledger = wrap(Mixed(), lossless()), wrap(Mixed(), None), Ledger(Mixed(), sparse())
    for step in range(5):
        for ddp in (ours, plain):
            ddp.zero_grad()
            loss_of(ddp, step).backward()
        torch.testing.assert_close(flat(ours, grad_of), flat(plain, grad_of), rtol=0.05, atol=5e-3)
        torch.testing.assert_close(ours.module.head.weight.grad, plain.module.head.weight.grad)
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s).backward(), step))
        ledger.check(rtol=0.05, atol=0.02)


class Scaled:
    """A model trained through a GradScaler; `poison` makes one rank's loss infinite."""

    def __init__(self, world: sc.World, *, collective: str = "allgather", feedback: Any = None, **scaler: Any) -> None:
        self.world = world
        self.scaler = torch.amp.GradScaler("cpu", **scaler)
        options = {"collective": collective} | ({} if feedback is None else {"feedback": feedback})
        self.state = sparse(scaler=self.scaler, **options)
        self.ledger = Ledger(mlp(), self.state)
        self.ledger.scale = self.scaler.get_scale
        self.optimizer = torch.optim.SGD(self.ledger.ddp.parameters(), lr=0.05)
        self.skipped: list[int] = []

    def step(self, number: int, poison: int | None = None, bad: float = math.inf) -> None:
        """One optimizer step, poisoned on a rank."""

        def backward() -> None:
            loss = loss_of(self.ledger.ddp, number)
            if self.world.rank == poison:
                loss = loss * bad
            self.scaler.scale(loss).backward()

        self.ledger.step(backward)
        before = flat(self.ledger.ddp).clone()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if torch.equal(flat(self.ledger.ddp), before):
            self.skipped.append(number)


def same_everywhere(value: Any) -> bool:
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return all(v == value for v in everyone)


@pytest.mark.parametrize("collective", ["allgather", "dense"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_overflows_on_one_rank_skip_the_step_on_all_and_lose_nothing(
    world: sc.World, collective: str, bad: float
) -> None:
    """Scales go down at each overflow and up between; the books are in unscaled units throughout."""
    run = Scaled(world, collective=collective, init_scale=2.0**10, growth_interval=3)
    scales = []
    poisoned = {2: 0, 3: world.size - 1, 9: world.size // 2}
    for step in range(12):
        run.step(step, poisoned.get(step), bad)
        run.ledger.check()
        run.ledger.check_replicas()
        scales.append(run.scaler.get_scale())
    assert run.skipped == list(poisoned)
    assert len(set(scales)) > 2
    assert same_everywhere((run.skipped, scales))
    assert math.isfinite(run.state.residual_norm())
    if collective == "allgather":
        assert run.state.residual_norm() > 0


def test_real_overflows_of_float16_activations_on_one_rank(world: sc.World) -> None:
    """Real overflows: the scale is so large that float16 gradients overflow, first on the rank with large data."""
    run = Scaled(world, init_scale=2.0**19, growth_interval=1000)
    finite, partly = [], 0
    for step in range(14):

        def backward(step: int = step) -> None:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(run.ledger.ddp, step)
            run.scaler.scale(loss * (4.0 if world.rank == world.size - 1 else 1 / 4)).backward()

        finite.append(run.ledger.step(backward))
        partly += not finite[-1] and any(bool(p.grad.isfinite().all()) for p in run.ledger.model.parameters())
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.ledger.check(rtol=1e-5, atol=1e-4)
        run.ledger.check_replicas()
    assert not finite[0], "the test needs a real overflow"
    assert any(finite)
    assert partly, "the test needs a step in which only some buckets overflow"
    assert same_everywhere((finite, run.scaler.get_scale()))


class Overflowing(nn.Module):
    """Gradients of the first layer overflow when told to; those of later layers, in other buckets, do not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.bad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner[0](x)
        if self.bad:
            hidden.register_hook(lambda g: g * math.inf)
        return self.inner[1:](hidden)


@pytest.mark.parametrize("collective", ["allgather", "dense"])
def test_a_run_with_overflows_that_sends_everything_equals_plain_ddp(world: sc.World, collective: str) -> None:
    """A skipped step leaves no trace there: the gradients of buckets that did not overflow are thrown away, too."""
    outcomes = []
    for hooked in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        ddp = wrap(Overflowing(), lossless(scaler=scaler, collective=collective) if hooked else None)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        for step in range(7):
            ddp.module.bad = step in (3, 4) and world.rank == 0
            optimizer.zero_grad()
            scaler.scale(loss_of(ddp, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**8
        outcomes.append(flat(ddp).clone())
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)


def test_every_overflow_in_a_row_and_recovery(world: sc.World) -> None:
    run = Scaled(world, init_scale=2.0**10)
    run.step(0)
    kept = run.state.residual_norm()
    for step in range(1, 6):
        run.step(step, world.size - 1)
    assert run.skipped == [1, 2, 3, 4, 5]
    assert run.scaler.get_scale() == 2.0**5
    assert math.isclose(run.state.residual_norm(), kept, rel_tol=1e-4), "what came in those steps was not finite"
    run.step(6)
    run.ledger.check()


@pytest.mark.filterwarnings("ignore::sparsecomm.ConvergenceWarning")
def test_unscaling_before_clipping(world: sc.World) -> None:
    """The usual recipe: unscale_, clip, step. The average is the same everywhere, so its norm is, too."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    ledger = Ledger(mlp(), sparse(scaler=scaler))
    ledger.scale = scaler.get_scale
    optimizer = torch.optim.AdamW(ledger.ddp.parameters(), lr=1e-2)
    for step in range(4):
        ledger.step(partial(lambda s: scaler.scale(loss_of(ledger.ddp, s)).backward(), step))
        ledger.check()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(ledger.ddp.parameters(), 0.1)
        assert same_everywhere(float(norm))
        scaler.step(optimizer)
        scaler.update()
        ledger.check_replicas()


def test_accumulation_under_a_scaler(world: sc.World) -> None:
    """The scale must not change between the batches that are accumulated, as torch says; then nothing is lost."""
    run = Scaled(world, init_scale=2.0**6, growth_interval=1)
    for step in range(4):

        def backward(step: int = step) -> None:
            with run.ledger.ddp.no_sync():
                run.scaler.scale(loss_of(run.ledger.ddp, 100 + step)).backward()
            run.scaler.scale(loss_of(run.ledger.ddp, step)).backward()

        run.ledger.step(backward)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.ledger.check()
    assert run.scaler.get_scale() == 2.0**10


def test_momentum_correction_under_a_scaler_is_in_unscaled_units(world: sc.World) -> None:
    feedback = sc.MomentumCorrection(momentum=0.9)
    scaled = Scaled(world, feedback=feedback, init_scale=2.0**7, growth_interval=2)
    state = sparse(feedback=feedback)
    plain = wrap(mlp(), state)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(6):
        scaled.step(step)
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
    assert scaled.scaler.get_scale() == 2.0**10
    assert torch.equal(flat(scaled.ledger.ddp), flat(plain)), "powers of two change no bits"
    a, b = scaled.state.state_dict(), state.state_dict()
    assert any(k.startswith("velocity.") for k in a)
    assert all(torch.equal(a[k], b[k]) for k in b if not k.startswith("selector."))


def test_momentum_correction_takes_an_overflow_back(world: sc.World) -> None:
    run = Scaled(world, feedback=sc.MomentumCorrection(momentum=0.9), init_scale=2.0**7)
    for step in range(3):
        run.step(step)
    before = {k: t.clone() for k, t in run.state.state_dict().items() if k[:8] in ("residual", "velocity")}
    run.step(3, world.size - 1)
    assert run.skipped == [3]
    after = run.state.state_dict()
    for key, then in before.items():
        torch.testing.assert_close(after[key], then, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    run.step(4)
    run.ledger.check_replicas()


def test_a_disabled_scaler_is_as_none(world: sc.World) -> None:
    run = Scaled(world, enabled=False)
    plain = wrap(mlp(), sparse())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(4):
        run.step(step)
        run.ledger.check()
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
    assert torch.equal(flat(run.ledger.ddp), flat(plain))


def test_a_scaled_run_resumes_with_another_scale(world: sc.World) -> None:
    """Residuals are saved in unscaled units, so the scale they were kept under does not matter."""
    run = Scaled(world, init_scale=2.0**10)
    for step in range(3):
        run.step(step)
    again = Scaled(world, init_scale=2.0**4)
    again.ledger.model.load_state_dict(run.ledger.model.state_dict())
    again.state.load_state_dict(run.state.state_dict())
    left = again.ledger.residuals()
    again.ledger.given = {n: t.clone() for n, t in left.items()}  # what was left over comes in once
    for step in range(3, 6):
        again.step(step)
        again.ledger.check()
    assert not again.skipped


def test_a_scaler_may_be_attached_after_loading_and_before_the_first_step(world: sc.World) -> None:
    """The order of many resume scripts; nothing was exchanged in scaled units."""
    run = Scaled(world, init_scale=2.0**10)
    run.step(0)
    state = sparse()
    ddp = wrap(mlp(), state)
    state.load_state_dict(run.state.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    state.attach_scaler(scaler)
    scaler.scale(loss_of(ddp, 1)).backward()


def test_another_scaler_mid_run_is_refused_and_the_first_stays(world: sc.World) -> None:
    run = Scaled(world, init_scale=2.0**6)
    run.step(0)
    with pytest.raises(sc.StateError, match="after 1 step"):
        run.state.attach_scaler(torch.amp.GradScaler("cpu", init_scale=2.0))
    run.state.attach_scaler(run.scaler)  # the same again is no change
    run.step(1)
    run.ledger.check()
