"""Adam before compression: at density 1 it equals AdamW, and a failed step does not change the moments."""

from __future__ import annotations

import math

import pytest
import torch

import sparsecomm as sc
from sparsecomm.feedback import BucketLayout, BucketMemory, Incoming, take_some
from sparsecomm.runtime.arena import Arena


def losses(model: torch.nn.Module, steps: range) -> list[torch.Tensor]:
    out = []
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=g, dtype=torch.float32)
        out.append((model(x) - x.sum(1, keepdim=True)).square().mean())
    return out


def small_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5, dtype=torch.float32), torch.nn.Tanh(), torch.nn.Linear(5, 1, dtype=torch.float32)
    )


def train(model: torch.nn.Module, state: sc.SparseState | None, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        losses(model, range(step, step + 1))[0].backward()
        if state is not None:
            sc.allreduce_gradients(model, state, bucket_bytes=80)
        optimizer.step()


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def adam_state(model: torch.nn.Module, **options: object) -> sc.SparseState:
    feedback = sc.AdamCorrection(beta1=0.8, beta2=0.95)
    defaults: dict[str, object] = {"collective": "allgather", "value_codec": "fp32", "feedback": feedback}
    return sc.SparseState(sc.TopK(1.0), model=model, **{**defaults, **options})


@pytest.mark.parametrize("collective", ["allgather", "dense"])
def test_one_rank_that_sends_everything_is_adamw(collective: str) -> None:
    sc.init()
    ours, plain = small_model(), small_model()
    state = adam_state(ours, collective=collective)
    train(ours, state, torch.optim.SGD(ours.parameters(), lr=0.01, weight_decay=0.1), range(12))
    train(plain, None, torch.optim.AdamW(plain.parameters(), 0.01, (0.8, 0.95), 1e-8, 0.1), range(12))
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_from_its_checkpoint_with_the_right_bias_correction() -> None:
    sc.init()
    whole, first = small_model(), small_model()
    a = adam_state(whole)
    train(whole, a, torch.optim.SGD(whole.parameters(), lr=0.01), range(8))
    b = adam_state(first)
    train(first, b, torch.optim.SGD(first.parameters(), lr=0.01), range(4))
    saved = {k: t.clone() for k, t in b.state_dict().items()}
    assert int(saved["moment_steps"]) == 4
    assert any(k.startswith("second_moment.") for k in saved)
    second = small_model()
    second.load_state_dict(first.state_dict())
    c = adam_state(second)
    c.load_state_dict(saved)
    train(second, c, torch.optim.SGD(second.parameters(), lr=0.01), range(4, 8))
    assert torch.equal(flat(second), flat(whole))


def test_switched_on_mid_run_it_starts_its_moments_there() -> None:
    """Bias correction must count from that step, or the first update would be far too small."""
    sc.init()
    model = small_model()
    state = adam_state(model, feedback=sc.ErrorFeedback())
    train(model, state, torch.optim.SGD(model.parameters(), lr=0.0), range(5))
    state.update(feedback=sc.AdamCorrection())
    train(model, state, torch.optim.SGD(model.parameters(), lr=0.0), range(5, 6))
    updates = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    # The first update of Adam is a sign.
    torch.testing.assert_close(updates.abs(), torch.ones_like(updates), rtol=1e-3, atol=1e-3)


def test_most_is_kept_back_and_nothing_lost_at_low_density() -> None:
    sc.init()
    model = small_model()
    state = adam_state(model)
    state.update(density=0.1)
    dense = adam_state(model)
    sent = torch.zeros_like(flat(model))
    due = torch.zeros_like(sent)
    for step in range(6):
        model.zero_grad()
        losses(model, range(step, step + 1))[0].backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        for s, into in ((state, sent), (dense, due)):
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g.clone()
            sc.allreduce_gradients(model, s)
            into += torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    kept = state.state_dict()
    residual = torch.cat([kept[f"residual.{n}"].reshape(-1) for n, _ in model.named_parameters()])
    assert bool(residual.any())
    torch.testing.assert_close(sent + residual, due, rtol=1e-5, atol=1e-5)


class Broken(sc.TopK):
    def select(self, *args: object, **options: object) -> object:  # type: ignore[override]
        raise ValueError("broken")


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("grad_survives", [True, False])
def test_a_selection_that_fails_leaves_the_moments_as_they_were(beta1: float, grad_survives: bool) -> None:
    n = 6
    bucket = BucketMemory(0, BucketLayout(("w",), ((n,),), ((1,),)), residual=torch.arange(6.0, dtype=torch.float32))
    bucket.velocity = torch.arange(6.0, dtype=torch.float32) / 7 if beta1 else torch.zeros(n, dtype=torch.float32)
    bucket.second_moment = torch.arange(6.0, dtype=torch.float32) / 5
    before = [t.clone() for t in (bucket.residual, bucket.velocity, bucket.second_moment) if t is not None]
    grad = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.0, 5.0], dtype=torch.float32)
    feedback = sc.AdamCorrection(beta1=beta1)
    with pytest.raises(ValueError, match="broken"):
        take_some(
            bucket, Incoming(grad, feedback, unused=((3, 5),), grad_survives=grad_survives), Broken(0.2), 1, Arena()
        )
    for was, now in zip(before, (bucket.residual, bucket.velocity, bucket.second_moment), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-6)


def test_second_moments_are_resharded_as_means_and_stay_positive() -> None:
    def saved(rank: int) -> dict[str, torch.Tensor]:
        numbers = {"step": 3, "rank": rank, "world_size": 2, "moment_steps": 3}
        memories = {
            f"{kind}.w": torch.full((2,), rank + 1.0, dtype=torch.float32)
            for kind in ("residual", "velocity", "second_moment")
        }
        return {**{k: torch.tensor(v, dtype=torch.int64) for k, v in numbers.items()}, **memories}

    one = sc.reshard([saved(0), saved(1)], 1)[0]
    assert one["second_moment.w"].tolist() == [1.5, 1.5]
    assert int(one["moment_steps"]) == 3
    three = sc.reshard([saved(0), saved(1)], 3)
    assert [float(d["second_moment.w"][0]) for d in three] == [1.0, 2.0, 1.0]
    assert math.isclose(sum(float(d["residual.w"][0]) for d in three) / 3, 1.5)
    bad = saved(0)
    bad["second_moment.w"][0] = -1.0
    with pytest.raises(sc.StateError, match="negative"):
        sc.reshard([bad, saved(1)], 1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"eps": 0.0}, "eps"),
        ({"masking": 1}, "masking"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"beta1": True}, "beta1"),
    ],
)
def test_options_that_are_none_are_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(sc.ConfigError, match=f"AdamCorrection.{named}"):
        sc.AdamCorrection(**options)  # type: ignore[arg-type]
