"""Two levels in simulated worlds: nodes of any size, with ranks in any order; no part of a gradient is lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import (
    EPS32,
    KINDS,
    Cluster,
    Raising,
    assert_conserved,
    assert_restored,
    gradient,
    gradients,
    magnitude,
    mpirun_command,
    plan,
    rounding_of,
    run_job,
    same_bits,
    total,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomm.compress import ThresholdTopK, TopK
from sparsecomm.errors import CollectiveMismatch, CommTimeout, ConfigError, RemoteError, TransportError, WireError
from sparsecomm.exchange import exchange
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.exchange.methods.two_level.leaders import leaders_method
from sparsecomm.exchange.methods.two_level.method import two_level_bytes
from sparsecomm.feedback import MomentumCorrection
from sparsecomm.launch.world import _given_nodes as given_nodes
from sparsecomm.transport import SimulatedWorld
from sparsecomm.types import GRAD_DTYPES, IndexCodec, Sizes, ValueCodec

N = 120


@dataclass(frozen=True)
class Situation:
    """P ranks on some nodes, with gradients of some kinds."""

    nodes: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    kinds: tuple[str, ...]
    seed: int

    @property
    def size(self) -> int:
        return len(self.nodes)

    def grads(self, step: int) -> list[torch.Tensor]:
        return gradients(self.kinds, self.size, self.numel, self.dtype, self.seed + 1000 * step)


situations = st.builds(
    Situation,
    nodes=st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple),
    numel=st.sampled_from([1, 2, 7, 128, 300]) | st.integers(1, 400),
    dtype=st.sampled_from(GRAD_DTYPES),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
)


def how(numel: int, step: int = 0, **options: Any):  # type: ignore[no-untyped-def]
    return plan(numel, step=step, collective="two_level", **options)


@given(
    situations,
    st.sampled_from([0.001, 0.1, 0.6, 1.0]).flatmap(lambda d: st.sampled_from([TopK(d), ThresholdTopK(d)])),
    st.sampled_from(ValueCodec),
    st.sampled_from([None, IndexCodec.RAW]),
)
def test_steps_conserve_and_replicas_agree(
    situation: Situation, compressor: TopK, value_codec: ValueCodec, index_codec: IndexCodec | None
) -> None:
    cluster = Cluster(situation.size, situation.numel, nodes=situation.nodes)
    leaders = {situation.nodes.index(node) for node in situation.nodes}
    for step in range(4):
        grads = situation.grads(step)
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        options = {"compressor": compressor, "value_codec": value_codec, "index_codec": index_codec}
        cluster.step(applied, how(situation.numel, step, **options))
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert_conserved(grads, before, applied[0], cluster.residuals)
        for rank, residual in enumerate(cluster.residuals):
            assert rank in leaders or not bool(residual.any()), "what is left over is the leader's"


@given(situations)
@settings(max_examples=15)
def test_everything_in_fp32_equals_the_mean(situation: Situation) -> None:
    cluster = Cluster(situation.size, situation.numel, nodes=situation.nodes)
    grads = situation.grads(0)
    applied = [g.clone() for g in grads]
    cluster.step(applied, how(situation.numel, density=1.0))
    mean = total(grads) / situation.size
    allowed = (situation.size + 4) * EPS32 * magnitude(grads) / situation.size + rounding_of(situation.dtype, mean)
    assert bool(((applied[0].double() - mean).abs() <= allowed + 2.0**-147).all())
    assert all(bool((r.abs() <= situation.size * 2.0**-148).all()) for r in cluster.residuals)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_on_one_node_nothing_is_compressed(size: int) -> None:
    cluster = Cluster(size, N)
    grads = [gradient("normal", N, torch.float32, r) for r in range(size)]
    for r, residual in enumerate(cluster.residuals):
        residual.copy_(gradient("normal", N, torch.float32, 50 + r))
    mean = total([*grads, *cluster.residuals]) / size
    reports = cluster.step(grads, how(N, density=0.01))
    torch.testing.assert_close(grads[0].double(), mean, rtol=1e-5, atol=1e-6)
    assert all(bool((r == 0).all()) for r in cluster.residuals)
    assert [r.nnz for r in reports] == [N] * size


def test_one_rank_a_node_is_the_sparse_allgather() -> None:
    ours, other = Cluster(3, N, nodes=(5, 1, 3)), Cluster(3, N)
    for step in range(3):
        a, b = ([gradient("normal", N, torch.float32, 10 * step + r) for r in range(3)] for _ in range(2))
        ours.step(a, how(N, step, value_codec=ValueCodec.FP16))
        other.step(b, plan(N, step=step, value_codec=ValueCodec.FP16))
        torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)
        for mine, theirs in zip(ours.residuals, other.residuals, strict=True):
            assert torch.equal(mine, theirs)


@given(st.lists(st.sampled_from(["two_level", "allgather", "dense", "split_reduce"]), min_size=3, max_size=7))
@settings(max_examples=25)
def test_changing_the_collective_on_the_way_loses_nothing(collectives: list[str]) -> None:
    """After other methods all ranks have residuals, and two levels must include those of non-leaders."""
    cluster = Cluster(5, N, nodes=(0, 1, 0, 1, 1))
    for step, collective in enumerate(collectives):
        grads = [gradient("normal", N, torch.float32, 10 * step + r) for r in range(5)]
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        cluster.step(applied, plan(N, step=step, collective=collective, value_codec=ValueCodec.INT8))
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert_conserved(grads, before, applied[0], cluster.residuals)


@pytest.mark.parametrize("density", [0.02, 0.05])
def test_many_nodes_use_split_reduce_and_leaders_send_what_is_estimated(density: float) -> None:
    nodes, numel = [r // 2 for r in range(16)], 40_000
    cluster = Cluster(16, numel, nodes=nodes)
    for step in range(3):
        grads = [gradient("normal", numel, torch.float32, 100 * step + r) for r in range(16)]
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        options = how(numel, step, density=density, value_codec=ValueCodec.FP16)
        reports = cluster.step(applied, options)
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert_conserved(grads, before, applied[0], cluster.residuals)
    assert cluster.buckets[0].shared is not None, "regions of a split-reduce between the leaders"
    assert cluster.buckets[1].shared is None
    leaders = [r.bytes_sent for r in reports[::2]]
    expected = two_level_bytes(Sizes(options.k, numel, len(nodes), ValueCodec.FP16), nodes)
    assert 0.9 < max(leaders) / expected < 1.35, "what a split-reduce keeps is k within a third"
    assert {r.bytes_sent for r in reports[1::2]} == {4 * numel + 15 * 88}, "the others send their sum and headers"


@pytest.mark.parametrize("masking", [False, True])
def test_momentum_is_zeroed_on_all_ranks_of_a_node_where_its_leader_selected(masking: bool) -> None:
    options = MomentumCorrection(0.5, masking=masking)
    cluster = Cluster(4, N, nodes=(0, 0, 1, 1))
    for bucket in cluster.buckets:
        bucket.velocity = torch.zeros(N, dtype=torch.float32)
    grads = [gradient("normal", N, torch.float32, r) for r in range(4)]
    first, second = grads[0] + grads[1], grads[2] + grads[3]
    cluster.step([g.clone() for g in grads], how(N, feedback=options))
    for r, node in enumerate([first, first, second, second]):
        velocity = cluster.buckets[r].velocity
        assert velocity is not None
        chosen = node.abs().topk(N // 10).indices if masking else torch.empty(0, dtype=torch.int64)
        expected = grads[r].clone()
        expected[chosen] = 0.0
        torch.testing.assert_close(velocity, expected)


@pytest.mark.parametrize("codec", [ValueCodec.FP32, ValueCodec.INT8])
def test_spans_that_are_put_aside_stay(codec: ValueCodec) -> None:
    cluster = Cluster(4, N, nodes=(0, 0, 1, 1))
    for step in range(5):
        grads = [gradient("normal", N, torch.float32, 10 * step + r) for r in range(4)]
        plans = []
        for r in range(4):
            held = ((10, 50),) if (r + step) % 2 else ()
            for start, end in held:
                grads[r][start:end] = 0.0
            plans.append(how(N, step, density=0.3, value_codec=codec, unused=held))
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        cluster.step(applied, plans)
        assert_conserved(grads, before, applied[0], cluster.residuals)


# --- bad input and failures ---------------------------------------------------------------------------------------


class Scene:
    """Five ranks on two nodes, after one step."""

    nodes = (0, 1, 0, 1, 1)

    def __init__(self) -> None:
        self.cluster = Cluster(5, N, bucket=4, nodes=self.nodes)
        self.cluster.step([self.grad(0, r) for r in range(5)], how(N))
        self.before = [r.clone() for r in self.cluster.residuals]
        self.sent = [self.grad(1, r) for r in range(5)]
        self.grads = [g.clone() for g in self.sent]

    @staticmethod
    def grad(step: int, rank: int) -> torch.Tensor:
        return gradient("normal", N, torch.float32, 100 * step + rank)

    def assert_untouched(self, rank: int) -> None:
        assert same_bits(self.grads[rank], self.sent[rank])
        assert_restored([self.cluster.residuals[rank]], [self.before[rank]], [self.sent[rank]])


@pytest.mark.parametrize("odd", range(5))
def test_a_compressor_that_fails_is_named_everywhere(odd: int) -> None:
    """The compressor of a leader fails after the sum inside the node. Those of other ranks are never called."""
    scene = Scene()
    plans = [how(N, 1)] * 5
    plans[odd] = replace(plans[odd], compressor=Raising("out of cheese"))
    outcomes = scene.cluster.exchange(scene.grads, plans)
    if odd > 1:
        assert not any(isinstance(o, BaseException) for o in outcomes)
        return
    assert isinstance(outcomes[odd], ValueError)
    for rank in set(range(5)) - {odd}:
        assert isinstance(outcomes[rank], RemoteError)
        assert "ValueError: out of cheese" in str(outcomes[rank])
        assert f"rank {odd} failed in bucket 4 of step 1" in str(outcomes[rank])
    for rank in range(5):
        scene.assert_untouched(rank)
    again = [g.clone() for g in scene.sent]
    scene.cluster.step(again, how(N, 1))
    assert_conserved(scene.sent, scene.before, again[0], scene.cluster.residuals)


@pytest.mark.parametrize("odd", range(5))
def test_nonfinite_gradients_skip_the_step_everywhere(odd: int) -> None:
    scene = Scene()
    scene.grads[odd][7] = float("inf")
    reports = scene.cluster.exchange(scene.grads, how(N, 1))
    assert [r.skipped for r in reports] == [1] * 5
    assert all(bool(g.isnan().all()) for g in scene.grads)
    assert_restored(scene.cluster.residuals, scene.before, scene.sent)


@pytest.mark.parametrize("ranks", [(0, 2), (0, 1), (1, 3)])
def test_sums_that_overflow_in_a_node_or_between_nodes_skip_the_step_everywhere(ranks: tuple[int, ...]) -> None:
    scene = Scene()
    for r in ranks:
        scene.grads[r][3] = 3e38
    scene.sent = [g.clone() for g in scene.grads]
    reports = scene.cluster.exchange(scene.grads, how(N, 1))
    assert [r.skipped for r in reports] == [1] * 5
    assert all(bool(g.isnan().all()) for g in scene.grads)
    assert_restored(scene.cluster.residuals, scene.before, scene.sent)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_step_that_the_optimizer_skips_is_taken_back_whole(skipped: bool, momentum: bool) -> None:
    scene = Scene()
    cluster = scene.cluster
    feedback = {"feedback": MomentumCorrection(0.9)} if momentum else {}
    for bucket in cluster.buckets if momentum else ():
        bucket.velocity = torch.ones(N, dtype=torch.float32)
    options = how(N, 1, **feedback)
    cluster.world.run(
        lambda c: exchange(
            c, cluster.buckets[c.rank], scene.grads[c.rank], replace(options, final=False), cluster.arenas[c.rank]
        )
    )
    applied = scene.grads[0].clone()
    for bucket in cluster.buckets:
        bucket.finish_step(skipped=skipped)
    if skipped:
        assert all(same_bits(a, b) for a, b in zip(cluster.residuals, scene.before, strict=True))
        assert not momentum or all(bool((b.velocity == 1).all()) for b in cluster.buckets if b.velocity is not None)
    elif not momentum:
        assert_conserved(scene.sent, scene.before, applied, cluster.residuals)


def test_ranks_that_disagree_are_told_so() -> None:
    scene = Scene()
    for change, word in (
        ({"k": 7}, "k = 7"),
        ({"value_codec": ValueCodec.INT8}, "value_codec = INT8"),
        ({"feedback": MomentumCorrection(0.5)}, "nodes"),
    ):
        scene.cluster.buckets[3].velocity = torch.zeros(N, dtype=torch.float32)
        plans = [how(N, 1)] * 5
        plans[3] = replace(plans[3], **change)
        outcomes = scene.cluster.exchange(scene.grads, plans)
        assert all(isinstance(o, CollectiveMismatch) and word in str(o) for o in outcomes)
        for rank in range(5):
            scene.assert_untouched(rank)


def test_ranks_that_see_other_nodes_are_told_so() -> None:
    scene = Scene()
    scene.cluster.world.ranks[2].nodes = (0, 0, 0, 1, 1)
    outcomes = scene.cluster.exchange(scene.grads, how(N, 1))
    assert all(isinstance(o, CollectiveMismatch) and "nodes" in str(o) for o in outcomes)


def test_leaders_that_disagree_between_themselves_tell_their_nodes() -> None:
    """Leaders with different index codecs choose different methods, which only the leaders notice."""
    nodes, numel = [r // 2 for r in range(8)], 5000
    cluster = Cluster(8, numel, nodes=nodes)
    plans = [how(numel, density=0.01, value_codec=ValueCodec.FP16)] * 8
    plans[4] = replace(plans[4], index_codec=IndexCodec.RAW)
    kinds = [leaders_method(Sizes(p.k, numel, 4, p.value_codec, p.index_codec)) for p in (plans[0], plans[4])]
    assert kinds[0] != kinds[1], "else this proves nothing"
    outcomes = cluster.exchange([gradient("normal", numel, torch.float32, r) for r in range(8)], plans)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, CollectiveMismatch if rank % 2 == 0 else RemoteError)
        assert "between the leaders of nodes, ranks [0, 2, 4, 6], there numbered from 0" in str(outcome)
        assert "rank 2: collective" in str(outcome)


@pytest.mark.parametrize(("source", "dest"), [(2, 0), (0, 2), (1, 0), (1, 4)])
@pytest.mark.parametrize("damage", ["lost", "flipped", "cut"])
def test_a_damaged_message_is_an_error_and_nothing_is_half_applied(source: int, dest: int, damage: str) -> None:
    """Damages each message in turn: from a rank to its leader, back, and between leaders."""
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
        "lost": lambda message: None,
        "flipped": lambda message: message.index_fill(0, torch.tensor([message.numel() // 2], dtype=torch.int64), 0x5A),
        "cut": lambda message: message[:-1].clone(),
    }
    for nth in range(12):
        scene, seen = Scene(), 0

        def tamper(s: int, d: int, message: torch.Tensor, nth: int = nth) -> torch.Tensor | None:
            nonlocal seen
            if (s, d) != (source, dest):
                return message
            seen += 1
            return changes[damage](message) if seen == nth + 1 else message

        scene.cluster.world.tamper = tamper
        outcomes = scene.cluster.exchange(scene.grads, how(N, 1, value_codec=ValueCodec.FP16))
        if seen <= nth:
            return
        bad = outcomes[dest]
        dense = damage == "flipped" and seen and not isinstance(bad, BaseException)
        assert dense or isinstance(bad, (WireError, CommTimeout, TransportError)), bad
        if isinstance(bad, WireError):
            assert bad.rank is not None
            assert scene.nodes[bad.rank] is not None
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                scene.assert_untouched(rank)
    raise AssertionError("more messages than there are")


@pytest.mark.parametrize(
    ("nodes", "text", "expected"),
    [(None, None, None), ([0, 5, 0], "1,1,1", (0, 5, 0)), (None, "0, 0,7", (0, 0, 7)), ((2, 2, 2), None, (2, 2, 2))],
)
def test_nodes_are_taken_from_the_call_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, nodes: Any, text: str | None, expected: Any
) -> None:
    monkeypatch.delenv("SPARSECOMM_NODES", raising=False)
    if text is not None:
        monkeypatch.setenv("SPARSECOMM_NODES", text)
    assert given_nodes(nodes, 3) == expected


@pytest.mark.parametrize(
    ("nodes", "text"),
    [([0, 1], None), ([0, 1, -1], None), ([0, 1, True], None), (None, "0,1"), (None, ""), (None, "0,1,x")],
)
def test_nodes_that_are_not_those_of_all_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, nodes: Any, text: str | None
) -> None:
    if text is not None:
        monkeypatch.setenv("SPARSECOMM_NODES", text)
    with pytest.raises(ConfigError, match=r"(nodes|SPARSECOMM_NODES) = .* is not the node of each of 3 ranks"):
        given_nodes(nodes, 3)


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_given_nodes_reach_every_rank() -> None:
    code = "import sparsecomm as sc; w = sc.init(); print('nodes', *w.nodes, w.engine.transport.one_host)"
    job = run_job([*mpirun_command(3), sys.executable, "-c", code], deadline=90, env={"SPARSECOMM_NODES": "0,0,1"})
    assert job.code == 0, job
    assert job.out.count("nodes 0 0 1 False") == 3, job


def test_an_inner_group_must_be_one() -> None:
    with pytest.raises(ConfigError, match="inner_group must be a process group"):
        SparseConfig(collective="two_level", inner_group=[0, 1])  # type: ignore[arg-type]


def test_a_world_with_nodes_for_other_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nodes = \[0, 1\] names 2 of 3 ranks"):
        SimulatedWorld(3, (0, 1))
