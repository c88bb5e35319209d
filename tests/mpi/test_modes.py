"""DDP modes that no other file here tests; docs/ddp-modes.md lists all modes."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import assert_replicas_equal, batch, flat, grad_of, loss_of, mlp, residual_of, summed, train, wrap

import sparsecomm as sc
from sparsecomm.errors import ConfigError


def everything(**options: Any) -> sc.SparseState:
    """A state that sends all values exactly, so that a run can be compared with plain DDP."""
    return sc.SparseState(sc.TopK(density=1.0), value_codec="fp32", collective="allgather", **options)


def sparse(**options: Any) -> sc.SparseState:
    return sc.SparseState(sc.TopK(density=0.1), collective="allgather", **options)


def assert_equals_plain_ddp(make: Any, steps: int = 4, **options: Any) -> None:
    """Trains the same model under plain DDP and under a hook that sends everything."""
    plain, ours = wrap(make(), None, **options), wrap(make(), everything(), **options)
    for _ in zip(train(plain, steps), train(ours, steps), strict=True):
        pass
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)
    assert_replicas_equal(ours)


class Tied(nn.Module):
    """One matrix used twice, as embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(12, 12, bias=False, dtype=torch.float32)
        self.second = nn.Linear(12, 12, bias=False, dtype=torch.float32)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 3, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Recomputing(nn.Module):
    """Activation checkpointing: the forward of a block runs again in backward."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        out = checkpoint(self.inner[:3], x, use_reentrant=self.reentrant)
        return self.inner[3:](out)


class Normalized(nn.Module):
    """Batch statistics in buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(
            nn.Linear(12, 16, dtype=torch.float32),
            nn.BatchNorm1d(16, dtype=torch.float32),
            nn.Tanh(),
            nn.Linear(16, 3, dtype=torch.float32),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_shared_parameters(world: sc.World) -> None:
    assert_equals_plain_ddp(Tied)
    state = sparse()
    ddp = wrap(Tied(), state)
    for _ in train(ddp, 3):
        pass
    assert_replicas_equal(ddp)
    assert "residual.first.weight" in state.state_dict()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(world: sc.World, reentrant: bool) -> None:
    assert_equals_plain_ddp(lambda: Recomputing(reentrant=reentrant))


def test_batch_norm_buffers(world: sc.World) -> None:
    assert_equals_plain_ddp(Normalized)


def test_autocast(world: sc.World) -> None:
    def run(state: sc.SparseState | None) -> torch.Tensor:
        ddp = wrap(mlp(), state)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(ddp, step)
            loss.backward()
            optimizer.step()
        assert_replicas_equal(ddp)
        return flat(ddp)

    torch.testing.assert_close(run(everything()), run(None), rtol=1e-3, atol=1e-4)


def test_parameters_frozen_and_thawed_mid_run_keep_their_residual(world: sc.World) -> None:
    """DDP allows it with find_unused_parameters; the residual of a frozen layer stays until it is thawed."""
    state = sparse()
    model = mlp()
    ddp = wrap(model, state, find_unused_parameters=True)
    names = [n for n, _ in model.named_parameters() if n.startswith("0.")]
    for _ in train(ddp, 3):
        pass
    before = {n: state.state_dict()[f"residual.{n}"].clone() for n in names}
    assert any(bool(t.any()) for t in before.values())
    model[0].requires_grad_(False)
    for _ in train(ddp, 3, first=3):
        pass
    after = state.state_dict()
    assert all(torch.equal(after[f"residual.{n}"], t) for n, t in before.items())
    model[0].requires_grad_(True)
    for _ in train(ddp, 3, first=6):
        pass
    assert any(not torch.equal(state.state_dict()[f"residual.{n}"], t) for n, t in before.items())
    assert_replicas_equal(ddp)


def test_a_new_ddp_around_a_partly_frozen_model_takes_the_old_state(world: sc.World) -> None:
    first = sparse()
    model = mlp()
    for _ in train(wrap(model, first), 3):
        pass
    saved = first.state_dict()
    model[0].requires_grad_(False)
    second = sparse()
    ddp = wrap(model, second)
    second.load_state_dict(saved)
    kept = second.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in saved.items() if k.startswith("residual."))
    for _ in train(ddp, 2, first=3):
        pass
    assert torch.equal(second.state_dict()["residual.0.weight"], saved["residual.0.weight"])


@pytest.mark.parametrize("optimize_ddp", [True, False])
def test_compiled_models(world: sc.World, optimize_ddp: bool) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch._dynamo.config.optimize_ddp
        torch._dynamo.config.optimize_ddp = optimize_ddp
        try:
            state = everything()
            ddp = wrap(mlp(), state, bucket_cap_mb=25)  # the optimizer of torch.compile wants no small later buckets
            compiled = torch.compile(ddp, backend="eager")
            plain = wrap(mlp(), None, bucket_cap_mb=25)
            for _ in zip(train(compiled, 3), train(plain, 3), strict=True):
                pass
        finally:
            torch._dynamo.config.optimize_ddp = before
            torch._dynamo.reset()
    assert state.metrics().steps == 3
    torch.testing.assert_close(flat(ddp), flat(plain), rtol=1e-4, atol=1e-6)


def test_the_python_reducer_is_refused_with_the_setting_that_works() -> None:
    with pytest.raises(ConfigError, match="optimize_ddp"):
        sc.sparse_hook(sc.SparseState(), (torch.zeros(1, dtype=torch.float32),) * 2)  # what it hands to hooks


def test_a_hook_registered_twice_is_refused(world: sc.World) -> None:
    ddp = wrap(mlp(), sparse())
    with pytest.raises(RuntimeError, match="once"):
        ddp.register_comm_hook(sparse(), sc.sparse_hook)


def test_clipping_the_global_norm_after_the_hook(world: sc.World) -> None:
    """The averaged gradient is the same on all ranks, so clipping it keeps replicas equal."""
    ddp = wrap(mlp(), sparse())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.05)
        optimizer.step()
    assert_replicas_equal(ddp)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_correction_sending_everything_is_momentum_before_averaging(world: sc.World, nesterov: bool) -> None:
    feedback = sc.MomentumCorrection(momentum=0.9, nesterov=nesterov, masking=False)
    ddp = wrap(mlp(), everything(feedback=feedback))
    plain = wrap(copy.deepcopy(ddp.module), None)
    ours = torch.optim.SGD(ddp.parameters(), lr=0.1)
    velocity: list[torch.Tensor] = [torch.zeros_like(p) for p in plain.parameters()]
    for step in range(4):
        ours.zero_grad()
        loss_of(ddp, step).backward()
        ours.step()
        plain.zero_grad()
        loss_of(plain, step).backward()
        with torch.no_grad():
            for p, u in zip(plain.parameters(), velocity, strict=True):
                assert p.grad is not None
                if nesterov:
                    u.add_(p.grad).mul_(0.9)
                    p -= 0.1 * (u + p.grad)
                else:
                    u.mul_(0.9).add_(p.grad)
                    p -= 0.1 * u
    torch.testing.assert_close(flat(ddp), flat(plain), rtol=1e-4, atol=1e-6)
    assert_replicas_equal(ddp)


@pytest.mark.parametrize("name", ["dgc", "ef-topk", "oktopk", "dense"])
def test_presets_train(world: sc.World, name: str) -> None:
    config = sc.preset(name, steps_per_epoch=1) if name == "dgc" else sc.preset(name)
    ddp = wrap(mlp(), sc.SparseState(config))
    for _ in train(ddp, 6, momentum=0.0):
        pass
    assert_replicas_equal(ddp)
    assert all(bool(torch.isfinite(p).all()) for p in ddp.parameters())


def test_options_changed_mid_run_keep_what_is_left_over(world: sc.World) -> None:
    state = sparse(value_codec="fp32")
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 3):
        pass
    for change in ({"density": 0.3}, {"compressor": sc.ThresholdTopK(density=0.2)}, {"collective": "dense"}):
        state.update(**change)
        before = summed(residual_of(state, ddp))
        alone = copy.deepcopy(ddp.module)
        alone.zero_grad()
        loss_of(alone, 9).backward()
        ddp.zero_grad()
        loss_of(ddp, 9).backward()
        applied = flat(ddp, grad_of) * world.size
        after = summed(residual_of(state, ddp))
        torch.testing.assert_close(applied + after, summed(flat(alone, grad_of)) + before, rtol=1e-5, atol=1e-6)


def test_the_timeline_shows_every_stage_of_every_bucket(
    world: sc.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecomm.runtime.trace import close_timeline, open_timeline

    monkeypatch.setenv("SPARSECOMM_TIMELINE", str(tmp_path / "trace.json"))
    open_timeline(world.rank)
    ddp = wrap(mlp(), sparse())
    for _ in train(ddp, 2):
        pass
    close_timeline()
    events = json.loads((tmp_path / f"trace.rank{world.rank}.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["name"] for e in spans} == {"select", "encode", "wait", "apply"}
    assert all(e["pid"] == world.rank and e["dur"] >= 0 for e in spans)
    assert len({e["tid"] for e in spans}) > 1


def test_the_profiler_sees_the_stages(world: sc.World) -> None:
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    ddp = wrap(mlp(), sparse())
    for _ in train(ddp, 2):
        pass
    settings = _ExperimentalConfig(profile_all_threads=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], experimental_config=settings) as profiler:
            for _ in train(ddp, 2, first=2):
                pass
    names = {e.key for e in profiler.key_averages()}
    assert {"sparsecomm::select", "sparsecomm::encode", "sparsecomm::apply"} <= names


def test_checkpoints_of_one_world_serve_another(world: sc.World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Saved by torch.save on every rank; resharded to more and to fewer ranks with (sum of residuals) / P kept."""
    import torch.distributed as dist

    state = sparse()
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 3):
        pass
    mine = state.state_dict()
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine)
    for size in (1, world.size, world.size + 1, 2 * world.size):
        made = sc.reshard(everyone, size)
        for name in (k for k in mine if k.startswith("residual.")):
            old = sum(d[name].double() for d in everyone) / world.size
            new = sum(d[name].double() for d in made) / size
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)


def test_inputs_of_the_batch_helper_differ_between_ranks(world: sc.World) -> None:
    """The tests here compare averages: they would prove nothing on equal data."""
    import torch.distributed as dist

    mine = batch(0)[0]
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, mine) == (world.rank == 0)
