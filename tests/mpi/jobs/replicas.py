"""FSDP2 with replicas, averaged by a state: 4 ranks as 2 replicas of 2 shards. Prints each check named and its rank."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import sparsecomm as sc

SHARDS = 2


class Uneven(nn.Module):
    """Has what a sharded model may have: odd rows, an empty shard, frozen parameters and a layer that rests."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(24, 5)  # 3 rows and 2
        self.single = nn.Linear(5, 1)  # nothing in the second shard
        self.rests = nn.Linear(24, 6)
        self.frozen = nn.Linear(24, 7).requires_grad_(False)
        self.last = nn.Linear(24, 3)
        self.last.bias.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(24))  # in the root's group
        self.resting = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        y = self.single(self.first(x).tanh()) + self.frozen(x).sum(-1, keepdim=True) + self.last(x)
        return y if self.resting else y + self.rests(x).mean(-1, keepdim=True)

    def layers(self) -> list[nn.Module]:
        return [self.first, self.single, self.rests, self.frozen, self.last]


class Large(nn.Sequential):
    """Half a million parameters, so that headers do not matter."""

    def __init__(self) -> None:
        torch.manual_seed(6)
        super().__init__(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 256))

    def layers(self) -> list[nn.Module]:
        return [self[0], self[2]]


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // SHARDS, SHARDS), mesh_dim_names=("replica", "shard"))


def sharded(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    for layer in model.layers():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def averaged(model: Any, mesh: DeviceMesh, density: float, **options: Any) -> tuple[Any, sc.SparseState]:
    """A sharded model and its state, which rounds nothing unless it is told to."""
    policy = {"mp_policy": options.pop("mp_policy")} if "mp_policy" in options else {}
    sharded(model, mesh["shard"], **policy)
    options = {"collective": "allgather", "value_codec": "fp32", "fuse_bytes": 0} | options
    state = sc.SparseState(sc.TopK(density), model=model, process_group=mesh["replica"].get_group(), **options)
    sc.average_replicas(model, state)
    return model, state


def batch(step: int, width: int = 24) -> torch.Tensor:
    return torch.randn(6, width, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def backward(model: Any, step: int, width: int = 24) -> None:
    model(batch(step, width)).square().mean().backward()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local().detach()  # type: ignore[attr-defined]


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's parts of the parameters that learn."""
    return {name: local(p) for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: local(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def residuals(state: sc.SparseState, names: Any) -> dict[str, torch.Tensor]:
    saved = state.state_dict()
    return {name: saved[f"residual.{name}"] for name in names}


def assert_replicas_equal(model: nn.Module, mesh: DeviceMesh) -> None:
    for name, mine in named(model).items():
        first = mine.clone()
        dist.broadcast(first, group_src=0, group=mesh["replica"].get_group())
        assert torch.equal(first, mine), f"{name} differs between replicas"


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for p, q in zip(source.parameters(), target.parameters(), strict=True):
            local(q).copy_(local(p))


# --- what holds -----------------------------------------------------------------------------------------------------


def dense() -> None:
    """At density 1 training equals torch's own HSDP."""
    mesh = grid()
    plain = sharded(Uneven(), mesh)
    ours, state = averaged(Uneven(), mesh, 1.0)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (plain, ours)]
    for step in range(5):
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        for name, p in named(plain).items():
            torch.testing.assert_close(named(ours)[name], p, rtol=1e-5, atol=1e-6)
    assert state.step == state.metrics().steps == 5
    assert state.metrics().bytes_sent > 0


def check_nothing_is_lost(
    ours: Any, state: sc.SparseState, mesh: DeviceMesh, run: Callable[[Any, int], None], **policy: Any
) -> None:
    """Compares with a twin whose replicas do not average, at the same parameters: its gradients are what goes in."""
    twin, group = sharded(type(ours)(), mesh["shard"], **policy), mesh["replica"].get_group()
    optimizer = torch.optim.SGD(ours.parameters(), 0.05)
    ranks = dist.get_world_size(group)
    before = {name: torch.zeros_like(p) for name, p in named(ours).items()}
    for step in range(5):
        if hasattr(ours, "resting"):
            ours.resting = twin.resting = step in (0, 1, 3)
        copy_parameters(ours, twin)
        for model in (ours, twin):
            model.zero_grad()
            run(model, step)
        applied, given, after = gradients(ours), gradients(twin), residuals(state, before)
        assert applied.keys() == given.keys()
        for name, was in before.items():
            if name not in given:
                assert torch.equal(after[name], was), f"{name} rested, but its residual changed"
                continue
            both = torch.stack([given[name].double() + was, after[name].double()])
            dist.all_reduce(both, group=group)
            torch.testing.assert_close(ranks * applied[name].double() + both[1], both[0], rtol=1e-5, atol=1e-6)
        before = after
        optimizer.step()
        assert_replicas_equal(ours, mesh)
    assert state.step == 5
    assert any(bool(t.any()) for t in before.values()), "nothing waits, so the check has no teeth"


def conserve() -> None:
    """Nothing is lost, with uneven and empty shards, frozen parameters and a layer that some passes leave out."""
    mesh = grid()
    ours, state = averaged(Uneven(), mesh, 0.1)
    check_nothing_is_lost(ours, state, mesh, backward)


def conserve_fused() -> None:
    """The same with small buckets exchanged together."""
    mesh = grid()
    ours, state = averaged(Uneven(), mesh, 0.1, fuse_bytes=1 << 16)
    check_nothing_is_lost(ours, state, mesh, backward)


def conserve_large() -> None:
    """The same at 1% of half a million parameters, in few bytes."""
    mesh = grid()
    ours, state = averaged(Large(), mesh, 0.01, value_codec="auto")
    check_nothing_is_lost(ours, state, mesh, lambda model, step: backward(model, step, 256))
    share = state.metrics().bytes_sent / state.metrics().dense_bytes
    assert share <= 1 / 80, f"{share:.4f} of the bytes of dense"
    if dist.get_rank() == 0:
        sys.stderr.write(f"bytes: 1/{1 / share:.1f} of dense\n")


def conserve_bf16() -> None:
    """The same with bfloat16 gradients."""
    mesh, policy = grid(), {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)}
    twin = sharded(Uneven(), mesh["shard"], **policy)
    ours, state = averaged(Uneven(), mesh, 0.1, **policy)
    group = mesh["replica"].get_group()
    for model in (twin, ours):
        backward(model, 0)
    given, applied, after = gradients(twin), gradients(ours), residuals(state, gradients(twin))
    for name, grad in given.items():
        both = torch.stack([grad.double(), after[name].double()])
        dist.all_reduce(both, group=group)
        sums = dist.get_world_size(group) * applied[name].double() + both[1]
        torch.testing.assert_close(sums, both[0], rtol=2**-7, atol=1e-6)  # the average is rounded to bfloat16
        assert applied[name].dtype == torch.float32
    assert_replicas_equal(ours, mesh)


def conserve_accumulated() -> None:
    """The same when two micro-batches are exchanged as one, and when they leave reduced sums behind."""
    mesh = grid()

    def with_sync(model: Any, step: int) -> None:
        model.set_requires_gradient_sync(False)
        backward(model, 2 * step)
        model.set_requires_gradient_sync(True)
        backward(model, 2 * step + 1)

    def with_sums(model: Any, step: int) -> None:
        model.set_requires_all_reduce(False)
        backward(model, 2 * step)
        model.set_requires_all_reduce(True)
        backward(model, 2 * step + 1)

    for run in (with_sync, with_sums):
        ours, state = averaged(Uneven(), mesh, 0.1)
        check_nothing_is_lost(ours, state, mesh, run)


def add_up() -> None:
    """Two passes without zero_grad between them add up two averages."""
    mesh = grid()
    ours, state = averaged(Uneven(), mesh, 1.0)
    backward(ours, 0)
    first = gradients(ours)
    ours.zero_grad()
    backward(ours, 1)
    second = gradients(ours)
    ours.zero_grad()
    backward(ours, 0)
    backward(ours, 1)
    for name, total in gradients(ours).items():
        torch.testing.assert_close(total, first[name] + second[name], rtol=1e-5, atol=1e-6)
    assert state.step == 4


def methods() -> None:
    """Other ways of exchanging and a root that is the only group; nothing is lost."""
    mesh = grid()
    for options in ({"collective": "split_reduce"}, {"collective": "native"}, {"collective": "auto"}):
        twin, ours = Large(), Large()
        fully_shard(twin, mesh=mesh)
        fully_shard(ours, mesh=mesh["shard"])
        state = sc.SparseState(sc.TopK(1.0), model=ours, process_group=mesh["replica"].get_group(), **options)
        sc.average_replicas(ours, state)
        for step in range(3):
            for model in (twin, ours):
                model.zero_grad()
                backward(model, step, 256)
            for name, grad in gradients(twin).items():
                torch.testing.assert_close(gradients(ours)[name], grad, rtol=2e-3, atol=1e-5)


def checkpoint() -> None:
    """A run that is saved and resumed in the middle goes on bit for bit; other shards' checkpoints are refused."""
    mesh = grid()

    def start() -> tuple[Any, sc.SparseState, torch.optim.Optimizer]:
        model, state = averaged(Uneven(), mesh, 0.1)
        return model, state, torch.optim.SGD(model.parameters(), 0.05)

    def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()

    straight, state, optimizer = start()
    train(straight, optimizer, range(3))
    saved, parameters = state.state_dict(), straight.state_dict()
    parameters = {name: p.clone() for name, p in parameters.items()}
    train(straight, optimizer, range(3, 6))

    resumed, again, optimizer = start()
    resumed.load_state_dict(parameters)
    again.load_state_dict(saved)
    train(resumed, optimizer, range(3, 6))
    for name, p in named(straight).items():
        assert torch.equal(named(resumed)[name], p), name
    assert again.step == state.step == 6
    refuse_other_shards(saved, again, mesh)


def refuse_other_shards(saved: dict[str, torch.Tensor], state: sc.SparseState, mesh: DeviceMesh) -> None:
    shard = mesh.get_local_rank("shard")
    other = saved | {"shard": torch.tensor(1 - shard)}
    before = state.state_dict()
    with refused(sc.StateError, f"which holds shard {shard} of 2, was given the checkpoint of shard {1 - shard} of 2"):
        state.load_state_dict(other)
    with refused(sc.StateError, f"was given the checkpoint of rank {1 - mesh.get_local_rank('replica')} of 2"):
        state.load_state_dict(saved | {"rank": torch.tensor(1 - mesh.get_local_rank("replica"))})
    whole = {key: t for key, t in saved.items() if key not in ("shard", "shards")}
    with refused(sc.StateError, "was given the checkpoint of shard 0 of 1"):
        state.load_state_dict(whole)
    assert all(torch.equal(t, before[key]) for key, t in state.state_dict().items())


def other_replicas() -> None:
    """The checkpoints of two replicas become those of one, shard by shard."""
    mesh = grid()
    model, state = averaged(Uneven(), mesh, 0.1)
    backward(model, 0)
    saved: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(saved, state.state_dict())
    mine = saved[mesh.get_local_rank("shard") :: SHARDS]
    (merged,) = sc.reshard(mine, 1)
    for name in named(model):
        key = f"residual.{name}"
        torch.testing.assert_close(merged[key], (mine[0][key] + mine[1][key]) / 2)
    assert (int(merged["shard"]), int(merged["shards"])) == (mesh.get_local_rank("shard"), SHARDS)
    with refused(sc.StateError, "rank 0 saved shard 0 of 2, rank 1 saved shard 1 of 2"):
        sc.reshard([saved[0], saved[1] | {"rank": torch.tensor(1)}], 1)


def other_shards() -> None:
    """The checkpoints of 2 replicas of 2 shards become those of 1 of 4 shards, and of 4 that are whole."""
    model, state = averaged(Uneven(), grid(), 0.1, feedback=sc.MomentumCorrection(0.9))
    backward(model, 0)
    saved: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(saved, state.state_dict())
    for replicas, shards in ((1, 4), (4, 1)):
        made = sc.reshard(saved, replicas, shards=shards)
        for key in (f"{kind}.{name}" for kind in ("residual", "velocity") for name in named(model)):
            whole = [torch.cat([d[key] for d in made[i * shards : (i + 1) * shards]]) for i in range(replicas)]
            was = [torch.cat([d[key] for d in saved[i : i + 2]]) for i in (0, 2)]
            torch.testing.assert_close(sum(whole) / replicas, sum(was) / 2)
            assert bool(was[0].any()) or "first" not in key, f"nothing waits in {key}"
        mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replica", "shard"))
        again, loaded = averaged(Uneven(), mesh, 0.1, feedback=sc.MomentumCorrection(0.9))
        mine = made[dist.get_rank()]
        loaded.load_state_dict(mine)
        assert all(torch.equal(t, mine[key]) for key, t in loaded.state_dict().items())
        backward(again, 1)
    with refused(sc.StateError, "need the checkpoints of all shards of all replicas"):
        sc.reshard(saved[::2], 1, shards=4)


def optimizers() -> None:
    """SGD and AdamW of sc.optim: at density 1 SGD is torch's; at 10% both learn, and take each gradient step-ahead."""
    mesh = grid()
    plain, (ours, state) = sharded(Uneven(), mesh), averaged(Uneven(), mesh, 1.0)
    pairs = [(plain, torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)), (ours, sgd(ours, state))]
    for step in range(5):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    for name, p in named(plain).items():
        torch.testing.assert_close(named(ours)[name], p, rtol=1e-4, atol=1e-5)
    for make in (sgd, adamw):
        ours, state = averaged(Uneven(), mesh, 0.1)
        check_steps_ahead(ours, make(ours, state), mesh)
    ours, state = averaged(Uneven(), mesh, 0.1)
    sc.optim.SGD(ours.parameters(), state, max_norm=1.0)
    with refused(sc.ConfigError, "clipping to a norm"):
        backward(ours, 0)


def sgd(model: Any, state: sc.SparseState) -> torch.optim.Optimizer:
    return sc.optim.SGD(model.parameters(), state, lr=0.05, momentum=0.9)


def adamw(model: Any, state: sc.SparseState) -> torch.optim.Optimizer:
    return sc.optim.AdamW(model.parameters(), state, lr=0.02)


def check_steps_ahead(model: Any, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> None:
    """Trains; parameters are ahead in a pass alone, and replicas end every step with the same bits."""
    parts = list(named(model).values())  # held here, since the model has whole layers in a pass
    losses = []
    for step in range(30):
        at = [part.clone() for part in parts]
        optimizer.zero_grad()
        loss = model(batch(step % 3)).square().mean()
        assert step == 0 or not all(map(torch.equal, parts, at)), "nothing is ahead in a pass"
        loss.backward()
        assert all(map(torch.equal, parts, at)), "not moved back"
        optimizer.step()
        assert_replicas_equal(model, mesh)
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


# --- what is refused ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(kind: type[Exception], text: str) -> Iterator[None]:
    """Expects an error that says something."""
    with pytest.raises(kind, match=re.escape(text)):
        yield


def bad_models() -> None:
    """What is refused before the first pass."""
    mesh = grid()
    replicas = mesh["replica"].get_group()

    def state_of(model: Any, **options: Any) -> sc.SparseState:
        return sc.SparseState(sc.TopK(0.1), model=model, **{"process_group": replicas} | options)

    model = Uneven()
    with refused(sc.ConfigError, "needs a model under fully_shard, got Uneven without any"):
        sc.average_replicas(model, state_of(model))
    model = sharded(Uneven(), mesh)
    with refused(sc.ConfigError, "torch averages over the replicas itself"):
        sc.average_replicas(model, state_of(model))
    model = Uneven()
    fully_shard(model.first, mesh=mesh["shard"])
    with refused(sc.ConfigError, "parameter 'scale' is not under fully_shard"):
        sc.average_replicas(model, state_of(model))
    model = fully_shard(Large(), mesh=mesh["shard"], shard_placement_fn=lambda p: Shard(p.dim() - 1))
    with refused(sc.ConfigError, "only rows are supported"):
        sc.average_replicas(model, state_of(model))
    model = sharded(Uneven(), mesh["shard"])
    first = "rank 0 holds shard 0 of 2 and rank 1 shard 1 of 2"
    for options in ({"process_group": None}, {"process_group": mesh["shard"].get_group()}):
        with refused(sc.ConfigError, first):
            sc.average_replicas(model, state_of(model, **options))
    with refused(sc.ConfigError, "this SparseState is of no model"):
        sc.average_replicas(model, sc.SparseState(sc.TopK(0.1), process_group=replicas))
    with refused(sc.ConfigError, "this SparseState is of another Large"):
        sc.average_replicas(model, state_of(Large()))
    with refused(sc.ConfigError, "needs a SparseState, got None"):
        sc.average_replicas(model, None)
    state = state_of(model)
    sc.average_replicas(model, state)
    with refused(sc.ConfigError, "average_replicas is called once"):
        sc.average_replicas(model, state)


def bad_passes() -> None:
    """What is refused in a backward pass, on every rank, after which training goes on."""
    mesh = grid()
    ours, _ = averaged(Uneven(), mesh, 0.1, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))
    with refused(sc.ConfigError, "reduce_dtype=torch.float16"):
        backward(ours, 0)
    ours, state = averaged(Uneven(), mesh, 0.1)
    if mesh.get_local_rank("replica") == 1:
        handle = ours.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    mine = mesh.get_local_rank("replica") == 1
    with refused(sc.ConfigError if mine else sc.RemoteError, "has a post-accumulate-grad hook"):
        backward(ours, 0)
    if mine:
        handle.remove()
    ours.zero_grad()
    backward(ours, 1)
    assert_replicas_equal(ours, mesh)
    double = Uneven().double()
    sharded(double, mesh["shard"])
    state = sc.SparseState(sc.TopK(0.1), model=double, process_group=mesh["replica"].get_group())
    sc.average_replicas(double, state)
    with refused(sc.ConfigError, "dtype torch.float64"):
        double(batch(0).double()).sum().backward()
    scaler = torch.amp.GradScaler("cpu")
    ours, _ = averaged(Uneven(), mesh, 0.1, scaler=scaler)
    with refused(sc.ConfigError, "scaler= is not supported"):
        scaler.scale(ours(batch(0)).sum()).backward()


def other_layers() -> None:
    """A layer that one replica alone uses ends the job, at once and with the reason."""
    mesh = grid()
    ours, _ = averaged(Uneven(), mesh, 0.1)
    ours.resting = mesh.get_local_rank("replica") == 1
    backward(ours, 0)


def interrupted() -> None:
    """A pass that ends with an error in the middle does not harm the next one."""

    class Stop(torch.autograd.Function):
        """Raises an error in its backward pass if it is told to."""

        armed = False

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            if Stop.armed:
                raise ValueError("stopped")
            return grad

    class Stoppable(Large):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](Stop.apply(self[1](self[0](x))))

    mesh = grid()
    plain, (ours, state) = sharded(Stoppable(), mesh), averaged(Stoppable(), mesh, 1.0)
    for model in (plain, ours):
        Stop.armed = True
        with refused(ValueError, "stopped"):
            backward(model, 0, 256)
        Stop.armed = False
        model.reset_iter_state()  # torch wants it after an error
        model.zero_grad()
        backward(model, 1, 256)
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(ours)[name], grad, rtol=1e-5, atol=1e-7)
    assert state.step == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "gloo":
        sc.init()
    else:
        dist.init_process_group("sparsecomm")
    run_checks(globals(), sys.argv[2:])
    if sys.argv[1] != "gloo":
        dist.destroy_process_group()
