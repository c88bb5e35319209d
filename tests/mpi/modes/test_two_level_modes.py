"""Training on two levels over real processes: nodes as found and as given, the inner leg over messages and Gloo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from ledger import Ledger, assert_skips_lose_nothing
from torch import nn
from training import TINY_BUCKETS, assert_replicas_equal, flat, loss_of, mlp, train, wrap

import sparsecomm as sc


@contextmanager
def placed(world: sc.World, how: str) -> Iterator[tuple[int, ...]]:
    """Gives the ranks nodes for a test, as SPARSECOMM_NODES does at start."""
    transport = world.engine.transport
    found = transport.nodes
    nodes = {
        "found": found,
        "pairs": tuple(r // 2 for r in range(world.size)),
        "alternating": tuple(r % 2 for r in range(world.size)),
        "each alone": tuple(range(world.size)),
        "uneven": tuple(int(r == world.size - 1) for r in range(world.size)),
    }[how]
    transport.nodes = nodes
    try:
        yield nodes
    finally:
        transport.nodes = found


def group_of_node(world: sc.World, nodes: tuple[int, ...]) -> dist.ProcessGroup:
    """Makes a Gloo group for every node; returns this rank's. Collective."""
    mine = None
    for node in sorted(set(nodes)):
        ranks = [r for r in range(world.size) if nodes[r] == node]
        group = dist.new_group(ranks, backend="gloo")
        if world.rank in ranks:
            mine = group
    assert mine is not None
    return mine


def test_ranks_of_this_machine_are_found_on_one_node(world: sc.World) -> None:
    assert len(world.nodes) == world.size
    assert set(world.nodes) == {world.nodes[0]}


@pytest.mark.parametrize(
    ("how", "codec"), [("found", "fp16"), ("pairs", "fp32"), ("alternating", "fp16"), ("uneven", "fp32")]
)
def test_nothing_is_lost_and_replicas_agree(world: sc.World, how: str, codec: str) -> None:
    with placed(world, how) as nodes:
        state = sc.SparseState(sc.TopK(0.1), collective="two_level", value_codec=codec)
        ledger = Ledger(mlp(), state)
        for step in range(4):
            ledger.step(lambda step=step: loss_of(ledger.ddp, step).backward())
            ledger.descend()
        ledger.check()
        ledger.check_replicas()
        leads = nodes.index(nodes[world.rank]) == world.rank
        assert (ledger.kept_back > 0) == (leads and len(set(nodes)) > 1)


@pytest.mark.parametrize(("how", "cap"), [("pairs", TINY_BUCKETS), ("uneven", 25.0)])
def test_the_inner_leg_may_be_a_torch_process_group(world: sc.World, how: str, cap: float) -> None:
    """With many buckets in flight: all ranks of a node must start the group's sums in the same order."""
    with placed(world, how) as nodes:
        options = {"collective": "two_level", "value_codec": "fp32"}
        over_group = sc.SparseState(sc.TopK(0.2), inner_group=group_of_node(world, nodes), **options)
        over_messages = sc.SparseState(sc.TopK(0.2), **options)
        ours, other = wrap(mlp(), over_group, bucket_cap_mb=cap), wrap(mlp(), over_messages, bucket_cap_mb=cap)
        for _ in zip(train(ours, 4, momentum=0.0), train(other, 4, momentum=0.0), strict=True):
            assert_replicas_equal(ours)
        torch.testing.assert_close(flat(ours), flat(other), rtol=1e-5, atol=1e-6)


def test_an_inner_group_of_other_ranks_is_refused_everywhere(world: sc.World) -> None:
    if world.size < 2:
        pytest.skip("one rank is always alone")
    with placed(world, "each alone"):
        state = sc.SparseState(sc.TopK(0.2), collective="two_level", inner_group=dist.group.WORLD)
        ddp = wrap(mlp(), state, bucket_cap_mb=25.0)
        with pytest.raises((RuntimeError, sc.ConfigError), match="inner_group has the ranks"):
            loss_of(ddp, 0).backward()


def test_a_nonfinite_step_gives_the_inner_group_free(world: sc.World) -> None:
    with placed(world, "pairs") as nodes:
        state = sc.SparseState(sc.TopK(0.2), collective="two_level", inner_group=group_of_node(world, nodes))
        ddp = wrap(mlp(), state)
        for step in range(4):
            ddp.zero_grad()
            loss = loss_of(ddp, step)
            (loss * float("nan") if step == 1 and world.rank == world.size - 1 else loss).backward()
            finite = all(bool(p.grad.isfinite().all()) for p in ddp.parameters() if p.grad is not None)
            assert finite == (step != 1)
        assert state.metrics().steps == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_train(world: sc.World, dtype: torch.dtype) -> None:
    with placed(world, "pairs"):
        ddp = wrap(mlp(dtype), sc.SparseState(sc.TopK(0.1), collective="two_level"))
        for _ in train(ddp, 3, momentum=0.0, dtype=dtype):
            assert_replicas_equal(ddp)
        assert bool(flat(ddp).isfinite().all())


def test_a_scaler_that_skips_loses_nothing(world: sc.World) -> None:
    def make(model: nn.Module, scaler: torch.amp.GradScaler) -> Ledger:
        state = sc.SparseState(sc.TopK(0.2), collective="two_level", value_codec="fp32", scaler=scaler)
        return Ledger(model, state)

    with placed(world, "alternating"):
        assert_skips_lose_nothing(make, steps=5, bad=(2, 4), every_step=False)


def test_changing_options_on_the_way(world: sc.World) -> None:
    with placed(world, "pairs"):
        state = sc.SparseState(sc.TopK(0.1), collective="allgather", value_codec="fp32")
        ledger = Ledger(mlp(), state)
        changes = [{"collective": "two_level"}, {"density": 0.4}, {"collective": "dense"}, {"collective": "two_level"}]
        for step, change in enumerate([*changes, {}]):
            ledger.step(lambda step=step: loss_of(ledger.ddp, step).backward())
            ledger.check()
            state.update(**change)


def test_auto_measures_inside_nodes_and_predicts_two_levels(world: sc.World) -> None:
    if world.size < 3:
        pytest.skip("needs a node of two ranks and another node")
    with placed(world, "pairs"):
        state = sc.SparseState(sc.TopK(0.1))
        ddp = wrap(mlp(), state)
        for _ in train(ddp, 5):
            assert_replicas_equal(ddp)
        text = state.explain()
    assert f"{(world.size + 1) // 2} nodes of at most 2 ranks; inside one" in text
    assert "two_level" in text
