"""Saving and loading a state: into fresh and live models, before and after registering, never of another model."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    TINY_BUCKETS,
    ConvNet,
    assert_replicas_equal,
    flat,
    grad_of,
    local_gradient,
    loss_of,
    mlp,
    residual_of,
    summed,
    train,
    wrap,
)

import sparsecomm as sc

IMAGES = {"shape": (3, 6, 6)}


def sparse(compressor: sc.Compressor | None = None, **options: Any) -> sc.SparseState:
    return sc.SparseState(compressor or sc.TopK(0.1), collective="allgather", **options)


def saved(state: sc.SparseState) -> dict[str, torch.Tensor]:
    """A checkpoint through torch.save, as a user would make it."""
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(
    state: sc.SparseState, model: nn.Module, steps: int = 5, *, bucket_cap_mb: float = TINY_BUCKETS, **data: Any
) -> nn.Module:
    ddp = wrap(model, state, bucket_cap_mb=bucket_cap_mb)
    for _ in train(ddp, steps, momentum=0.0, **data):
        pass
    return ddp


def fresh_copy(source: nn.Module, model: nn.Module) -> nn.Module:
    model.load_state_dict(source.module.state_dict())
    return model


@pytest.mark.parametrize("compressor", [sc.TopK(0.1), sc.ThresholdTopK(0.1, interval=100)], ids=repr)
@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("when", ["before registering", "after registering", "after a step"])
def test_a_run_resumed_in_a_fresh_model_has_the_residual_and_conserves_it(
    world: sc.World, compressor: sc.Compressor, codec: str, when: str
) -> None:
    state = sparse(compressor, value_codec=codec)
    ddp = trained(state, mlp())
    checkpoint = saved(state)
    again = sparse(compressor, value_codec=codec)
    model = fresh_copy(ddp, mlp())
    if when == "before registering":
        again.load_state_dict(checkpoint)
    resumed = wrap(model, again)
    if when == "after registering":
        again.load_state_dict(checkpoint)
    if when == "after a step":
        loss_of(resumed, 77).backward()
        again.load_state_dict(checkpoint)
    assert again.step == 5
    before = residual_of(again, resumed)
    assert torch.equal(before, residual_of(state, ddp))
    resumed.zero_grad()
    incoming = summed(local_gradient(resumed.module, 5) + before)
    loss_of(resumed, 5).backward()
    outgoing = world.size * flat(resumed, grad_of) + summed(residual_of(again, resumed))
    torch.testing.assert_close(outgoing, incoming, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compressor", [sc.TopK(0.1), sc.ThresholdTopK(0.1, interval=100)], ids=repr)
def test_loading_into_the_live_state_rewinds_it_exactly(world: sc.World, compressor: sc.Compressor) -> None:
    state = sparse(compressor)
    ddp = trained(state, mlp())
    checkpoint, weights = saved(state), flat(ddp).clone()
    for _ in train(ddp, 4, first=5, momentum=0.0):
        pass
    first = flat(ddp).clone()
    with torch.no_grad():
        nn.utils.vector_to_parameters(weights.float(), ddp.parameters())
    state.load_state_dict(checkpoint)
    for _ in train(ddp, 4, first=5, momentum=0.0):
        assert_replicas_equal(ddp)
    assert torch.equal(flat(ddp), first)
    assert state.step == 9


def test_channels_last_residuals_are_saved_in_shape_order(world: sc.World) -> None:
    state, plain = sparse(), sparse()
    last = trained(state, ConvNet().to(memory_format=torch.channels_last), 1, **IMAGES)
    contiguous = trained(plain, ConvNet(), 1, **IMAGES)
    assert saved(state)["residual.conv.weight"].shape == (4, 3, 3, 3)
    again = sparse()
    moved = wrap(fresh_copy(last, ConvNet()), again)
    again.load_state_dict(saved(state))
    assert torch.equal(residual_of(again, moved), residual_of(state, last))
    # The order of elements decides between equals only, so both models keep back the same.
    torch.testing.assert_close(residual_of(state, last), residual_of(plain, contiguous), rtol=1e-3, atol=1e-5)


def test_what_is_loaded_is_saved_again_whole_before_any_step(world: sc.World) -> None:
    state = sparse(sc.ThresholdTopK(0.1))
    trained(state, mlp())
    checkpoint = saved(state)
    assert any(k.startswith("selector.") for k in checkpoint)
    again = sparse(sc.ThresholdTopK(0.1))
    wrap(mlp(), again)
    again.load_state_dict(checkpoint)
    twice = saved(again)
    assert twice.keys() == checkpoint.keys()
    assert all(torch.equal(twice[k], checkpoint[k]) for k in twice)


def test_a_checkpoint_of_a_state_that_was_never_stepped_loads(world: sc.World) -> None:
    state, again = sparse(), sparse()
    wrap(mlp(), state), wrap(mlp(), again)
    again.load_state_dict(saved(state))
    assert again.step == 0


def test_a_model_with_frozen_parameters_loads_its_own_checkpoint(world: sc.World) -> None:
    def frozen() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)
        return model

    state, again = sparse(), sparse()
    ddp = trained(state, frozen())
    resumed = wrap(fresh_copy(ddp, frozen()), again)
    again.load_state_dict(saved(state))
    assert torch.equal(residual_of(again, resumed), residual_of(state, ddp))


def test_a_model_of_sparse_and_dense_buckets_loads_its_own_checkpoint(world: sc.World) -> None:
    """Small buckets are dense and never have a residual."""
    options = {"dense_below": 100, "dense_steps": 1}  # the first buckets are not the final ones
    state, again = sparse(**options), sparse(**options)
    ddp = trained(state, mlp(), bucket_cap_mb=0.0001)
    checkpoint = saved(state)
    kept = [k for k, v in checkpoint.items() if k.startswith("residual.") and v.any()]
    assert 0 < len(kept) < len(list(ddp.parameters())), "the test needs both kinds of bucket"
    resumed = wrap(fresh_copy(ddp, mlp()), again)
    again.load_state_dict(checkpoint)
    assert torch.equal(residual_of(again, resumed), residual_of(state, ddp))


class Other(nn.Module):
    """Like `mlp` by other names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 16, dtype=torch.float32)
        self.decoder = nn.Linear(16, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x).tanh())


def test_a_checkpoint_of_another_model_is_refused_by_name_and_nothing_changes(world: sc.World) -> None:
    state, other = sparse(), sparse()
    ddp = trained(state, mlp())
    trained(other, Other())
    before, step = residual_of(state, ddp), state.step
    with pytest.raises(sc.StateError, match=r"decoder.bias.*encoder.weight"):
        state.load_state_dict(saved(other))
    assert torch.equal(residual_of(state, ddp), before)
    assert state.step == step


def test_a_checkpoint_of_another_model_is_refused_when_it_was_loaded_before_registering(world: sc.World) -> None:
    other = sparse()
    trained(other, Other())
    state = sparse()
    state.load_state_dict(saved(other))
    ddp = wrap(mlp(), state)
    with pytest.raises(RuntimeError, match=r"another model.*(decoder|encoder)"):
        loss_of(ddp, 0).backward()
    assert isinstance(state.last_error, sc.StateError)


def test_a_checkpoint_of_other_shapes_is_refused_by_name_and_nothing_changes(world: sc.World) -> None:
    state = sparse()
    ddp = trained(state, mlp())
    checkpoint = saved(state)
    checkpoint["residual.2.weight"] = torch.zeros(3, 3, dtype=torch.float32)
    before = residual_of(state, ddp)
    with pytest.raises(sc.StateError, match=r"'2.weight'.*\(3, 3\).*\(10, 16\)"):
        state.load_state_dict(checkpoint)
    assert torch.equal(residual_of(state, ddp), before)


def test_a_checkpoint_of_other_shapes_is_refused_in_a_fresh_model_too(world: sc.World) -> None:
    source = sparse()
    trained(source, mlp())
    checkpoint = saved(source)
    checkpoint["residual.2.weight"] = torch.zeros(3, 3, dtype=torch.float32)
    state = sparse()
    ddp = wrap(mlp(), state)

    def load_and_step() -> None:
        state.load_state_dict(checkpoint)
        loss_of(ddp, 0).backward()

    with pytest.raises((sc.StateError, RuntimeError), match=r"'2.weight'.*\(3, 3\).*\(10, 16\)"):
        load_and_step()


DAMAGE: list[tuple[str, Any]] = [
    ("step", None),
    ("step", torch.tensor([1, 2], dtype=torch.int64)),
    ("step", torch.tensor(-1, dtype=torch.int64)),
    ("step", "three"),
    ("rank", None),
    ("world_size", None),
    ("world_size", torch.tensor(99, dtype=torch.int64)),
    ("surprise", torch.zeros(1, dtype=torch.float32)),
    ("selector.xyz", torch.zeros(3, dtype=torch.float64)),
    ("selector.0123456789abcdef", torch.zeros(2, dtype=torch.float64)),
    ("selector.0123456789abcdef", torch.tensor([-1.0, 0.0, 5.0], dtype=torch.float64)),
    ("selector.0123456789abcdef", "text"),
    ("residual.0.weight", "text"),
    ("residual.0.weight", torch.zeros(16, 12, dtype=torch.float16)),
    ("residual.0.weight", torch.full((16, 12), float("inf"), dtype=torch.float32)),
    ("residual.0.weight", torch.zeros(16, 12, dtype=torch.float32).to_sparse()),
]


@pytest.mark.parametrize(("key", "value"), DAMAGE, ids=[f"{i}-{d[0]}" for i, d in enumerate(DAMAGE)])
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(world: sc.World, key: str, value: Any) -> None:
    state = sparse(sc.ThresholdTopK(0.1))
    ddp = trained(state, mlp(), 3)
    checkpoint = saved(state)
    checkpoint.pop(key, None)
    if value is not None:
        checkpoint[key] = value
    before, step = saved(state), state.step
    with pytest.raises(sc.StateError):
        state.load_state_dict(checkpoint)
    after = saved(state)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert state.step == step
    loss_of(ddp, 3).backward()


def test_every_rank_loads_its_own_checkpoint(world: sc.World) -> None:
    state = sparse()
    trained(state, mlp())
    checkpoint = saved(state)
    checkpoint["rank"] = torch.tensor((world.rank + 1) % (world.size + 1), dtype=torch.int64)
    with pytest.raises(sc.StateError, match=rf"rank {world.rank} of {world.size}"):
        state.load_state_dict(checkpoint)


def test_a_state_is_not_picklable_and_says_what_is(world: sc.World) -> None:
    with pytest.raises(sc.StateError, match="state_dict"):
        pickle.dumps(sparse())


def test_a_ddp_model_with_a_state_can_be_saved(world: sc.World) -> None:
    state = sparse()
    ddp = trained(state, mlp(), 2)
    file = io.BytesIO()
    torch.save({"model": ddp.state_dict(), "comm": state.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    state.load_state_dict(loaded["comm"])
    ddp.load_state_dict(loaded["model"])


@pytest.mark.parametrize("new_size", [1, 2, 3, 4, 7])
def test_resharding_keeps_the_sum_of_residuals_over_p(world: sc.World, new_size: int) -> None:
    state = sparse()
    ddp = trained(state, mlp())
    checkpoints: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(checkpoints, saved(state))
    new = sc.reshard(checkpoints, new_size)
    assert [int(d["rank"]) for d in new] == list(range(new_size))
    assert all(int(d["world_size"]) == new_size and int(d["step"]) == 5 for d in new)
    for name, p in ddp.module.named_parameters():
        key = f"residual.{name}"
        old_mean = sum(c[key].double() for c in checkpoints) / world.size
        new_mean = sum((d[key] if d[key].numel() else torch.zeros_like(p)).double() for d in new) / new_size
        torch.testing.assert_close(new_mean, old_mean, rtol=1e-5, atol=1e-7)
