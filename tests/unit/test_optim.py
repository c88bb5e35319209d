"""sparsecomm.optim: one rank at density 1 trains as with torch; parameters are ahead only where they may be."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsecomm as sc


def small_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    out: torch.Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return out


def backward(model: torch.nn.Module, state: sc.SparseState | None, step: int) -> None:
    model.zero_grad()
    loss_of(model, step).backward()
    if state is not None:
        sc.allreduce_gradients(model, state, bucket_bytes=80)


def train(model: torch.nn.Module, state: sc.SparseState | None, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, state, step)
        optimizer.step()


def state_of(model: torch.nn.Module, density: float = 1.0) -> sc.SparseState:
    return sc.SparseState(sc.TopK(density), model=model, collective="allgather", value_codec="fp32")


@pytest.fixture(autouse=True)
def _world() -> None:
    sc.init()


def test_one_rank_that_sends_everything_is_adamw() -> None:
    ours, plain = small_model(), small_model()
    state = state_of(ours)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    train(ours, state, sc.optim.AdamW(ours.parameters(), state, **options), range(12))
    train(plain, None, torch.optim.AdamW(plain.parameters(), **options), range(12))
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_one_rank_that_sends_everything_is_sgd(nesterov: bool) -> None:
    ours, plain = small_model(), small_model()
    state = state_of(ours)
    options = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov}
    train(ours, state, sc.optim.SGD(ours.parameters(), state, **options), range(12))
    train(plain, None, torch.optim.SGD(plain.parameters(), **options), range(12))
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


def test_weight_decay_is_close_to_that_of_torch() -> None:
    ours, plain = small_model(), small_model()
    state = state_of(ours)
    train(ours, state, sc.optim.SGD(ours.parameters(), state, lr=0.01, momentum=0.9, weight_decay=0.01), range(40))
    train(plain, None, torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01), range(40))
    torch.testing.assert_close(flat(ours), flat(plain), rtol=0.02, atol=2e-3)


def test_gradients_are_taken_where_the_residual_is_applied() -> None:
    """One rank knows everything that is held back, so training follows AdamW however little is sent."""
    ours, plain = small_model(), small_model()
    state = state_of(ours, density=0.1)
    seen = []
    ours[0].register_forward_hook(lambda *_: seen.append(flat(ours)))
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.0}
    train(ours, state, sc.optim.AdamW(ours.parameters(), state, **options), range(12))
    optimizer = torch.optim.AdamW(plain.parameters(), **options)
    for step in range(12):
        torch.testing.assert_close(seen[step], flat(plain), rtol=1e-4, atol=1e-5)
        train(plain, None, optimizer, range(step, step + 1))
    assert not torch.allclose(flat(ours), flat(plain), rtol=1e-4, atol=1e-5), "the averaged parameters lag behind"


def moved_model() -> tuple[torch.nn.Module, sc.SparseState, sc.optim.AdamW]:
    """A model with something held back."""
    model = small_model()
    state = state_of(model, density=0.1)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=0.01)
    train(model, state, optimizer, range(3))
    return model, state, optimizer


def test_parameters_come_back_bit_for_bit() -> None:
    model, _, _ = moved_model()
    before = flat(model)
    loss = loss_of(model, 0)
    assert not torch.equal(flat(model), before), "ahead for the forward and backward passes"
    loss.backward()
    saved = model.state_dict()
    assert torch.equal(flat(model), before)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.values(), copy.deepcopy(model).state_dict().values(), strict=True)
    )


def test_evaluation_sees_the_averaged_parameters() -> None:
    model, _, _ = moved_model()
    before = flat(model)
    loss_of(model, 0).backward()
    model.eval()
    loss_of(model, 0)
    assert torch.equal(flat(model), before)
    model.train()
    with torch.no_grad():
        loss_of(model, 0)
    assert torch.equal(flat(model), before)


def test_accumulated_gradients_are_taken_at_one_place() -> None:
    model, state, optimizer = moved_model()
    loss_of(model, 0).backward()
    ahead = flat(model)
    loss_of(model, 1).backward()
    assert torch.equal(flat(model), ahead)
    sc.allreduce_gradients(model, state, bucket_bytes=80)
    optimizer.step()


def test_a_step_that_was_not_taken_is_not_lost() -> None:
    """Without optimizer.step(), the next pass is ahead of the same parameters by the residual of then."""
    model, state, _ = moved_model()
    before = flat(model)
    backward(model, state, 0)
    loss_of(model, 1)
    model.state_dict()
    assert torch.equal(flat(model), before)


def test_loading_a_model_in_the_middle_of_a_step() -> None:
    model, state, optimizer = moved_model()
    other = {k: torch.zeros_like(t) for k, t in model.state_dict().items()}
    loss_of(model, 0).backward()
    model.load_state_dict(other)
    assert not flat(model).any()
    sc.allreduce_gradients(model, state, bucket_bytes=80)
    optimizer.step()
    assert float(flat(model).abs().max()) < 0.1


def test_a_run_goes_on_from_its_checkpoint() -> None:
    whole, first, second = small_model(), small_model(), small_model()
    states = [state_of(m, density=0.1) for m in (whole, first, second)]
    a, b, c = (sc.optim.AdamW(m.parameters(), s, lr=0.01) for m, s in zip((whole, first, second), states, strict=True))
    train(whole, states[0], a, range(8))
    train(first, states[1], b, range(4))
    second.load_state_dict(first.state_dict())
    states[2].load_state_dict(states[1].state_dict())
    c.load_state_dict(b.state_dict())
    train(second, states[2], c, range(4, 8))
    assert torch.equal(flat(second), flat(whole))


def test_a_scheduler_may_change_rates_and_betas() -> None:
    model = small_model()
    state = state_of(model, density=0.5)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    for step in range(10):
        train(model, state, optimizer, range(step, step + 1))
        scheduler.step()
    assert isinstance(state.config.feedback, sc.AdamCorrection)
    assert state.config.feedback.beta1 != 0.9
    assert bool(flat(model).isfinite().all())


def test_groups_may_differ_in_rate_and_decay_but_not_in_betas() -> None:
    model = small_model()
    state = state_of(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    before = flat(model)
    train(model, state, sc.optim.AdamW(groups, state, lr=0.01, weight_decay=0.1), range(2))
    n = sum(p.numel() for p in model[0].parameters())
    assert torch.equal(flat(model)[:n], before[:n])
    assert not torch.equal(flat(model)[n:], before[n:])
    with pytest.raises(sc.ConfigError, match="all groups need the same betas"):
        sc.optim.AdamW(
            [{**groups[0], "params": [model[0].weight], "betas": (0.5, 0.9)}, {"params": [model[2].weight]}], state
        )


def test_frozen_parameters_stay() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    state = state_of(model, density=0.1)
    train(model, state, sc.optim.AdamW(model.parameters(), state, lr=0.01), range(4))
    assert torch.equal(model[0].weight, before)


def test_what_cannot_work_is_named() -> None:
    model = small_model()
    with pytest.raises(sc.ConfigError, match="needs the SparseState"):
        sc.optim.AdamW(model.parameters(), None)
    with pytest.raises(sc.ConfigError, match="register_comm_hook"):
        sc.optim.AdamW(model.parameters(), sc.SparseState(sc.TopK(0.1)))
    with pytest.raises(sc.ConfigError, match="does not have"):
        sc.optim.AdamW(small_model().parameters(), state_of(model))
    with pytest.raises(sc.ConfigError, match="clip_norm"):
        sc.optim.AdamW(model.parameters(), state_of(model), max_norm=-1.0)


def test_clipping_the_updates_is_named() -> None:
    """One rank measures nothing, so two simulated ranks' worth of it is put in by hand."""
    model = small_model()
    state = state_of(model, density=0.5)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=0.01)
    backward(model, state, 0)
    for known in state._memories.known.values():
        p = next(p for p in model.parameters() if id(p) == known.parameters[0])
        assert p.grad is not None
        sent = p.grad.flatten().nonzero()
        if len(sent):
            known.bucket.delivered = (int(sent[0]), float(p.grad.flatten()[sent[0]]))
    assert state.delivered()
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(sc.ConfigError, match=r"scaled the averages.*max_norm="):
        optimizer.step()
