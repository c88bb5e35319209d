"""Exchanges with positions that all ranks know, in simulated worlds: chunks, a shared seed, a leader's top-k."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from helpers import (
    EPS32,
    KINDS,
    Cluster,
    assert_conserved,
    gradient,
    gradients,
    layout,
    magnitude,
    plan,
    rounding_of,
    same_bits,
    total,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm.collectives import DenseAlgorithm, broadcast
from sparsecomm.collectives import allreduce as dense
from sparsecomm.compress import Compressor, Places, largest_chunks
from sparsecomm.compress.sample import sample
from sparsecomm.feedback import BucketMemory, MomentumCorrection
from sparsecomm.transport import Channel, CollectiveSteps, SimulatedWorld
from sparsecomm.types import GRAD_DTYPES, IndexCodec, ValueCodec

INDEX_CODECS = (None, IndexCodec.RICE, IndexCodec.BITPACK, IndexCodec.BITMAP, IndexCodec.RAW)


def collective_of(compressor: Compressor) -> str:
    return compressor.collectives[0]


@dataclass(frozen=True)
class Situation:
    """P ranks with gradients of some kinds, and the algorithm of the dense sum."""

    size: int
    numel: int
    dtype: torch.dtype
    kinds: tuple[str, ...]
    algorithm: DenseAlgorithm | None
    seed: int

    def grads(self, step: int) -> list[torch.Tensor]:
        return gradients(self.kinds, self.size, self.numel, self.dtype, self.seed + 1000 * step)

    def summing(self) -> AbstractContextManager[object]:
        """Forces the algorithm of the dense sum. Vectors this short would otherwise use doubling in float32."""
        if self.algorithm is None:
            return nullcontext()
        return mock.patch.object(dense, "choose_dense", return_value=self.algorithm)


situations = st.builds(
    Situation,
    size=st.integers(1, 9) | st.sampled_from([16, 17, 19]),
    numel=st.sampled_from([1, 2, 3, 7, 128, 300]) | st.integers(1, 400),
    dtype=st.sampled_from(GRAD_DTYPES),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    algorithm=st.sampled_from([None, DenseAlgorithm.RING, DenseAlgorithm.HALVING]),
    seed=st.integers(0, 2**31),
)
densities = st.sampled_from([0.001, 0.05, 0.3, 0.7, 1.0])
compressors = st.one_of(
    st.builds(sc.ChunkTopK, densities, chunk=st.sampled_from([1, 3, 16, 128, 10_000])),
    st.builds(sc.RandomK, densities, seed=st.integers(0, 3)),
    st.builds(sc.CyclicTopK, densities),
)


@given(situations, compressors, st.sampled_from(ValueCodec), st.sampled_from(INDEX_CODECS))
@settings(max_examples=40)
def test_steps_conserve_and_replicas_agree(
    situation: Situation, compressor: Compressor, value_codec: ValueCodec, index_codec: IndexCodec | None
) -> None:
    cluster = Cluster(situation.size, situation.numel)
    for step in range(4):
        grads = situation.grads(step)
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        how = plan(
            situation.numel,
            compressor=compressor,
            collective=collective_of(compressor),
            step=step,
            value_codec=value_codec,
            index_codec=index_codec,
        )
        with situation.summing():
            reports = cluster.step(applied, how)
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert_conserved(grads, before, applied[0], cluster.residuals)
        assert len({r.nnz for r in reports}) == 1
        assert reports[0].nnz <= how.k
        assert int(applied[0].count_nonzero()) <= how.k, "everything else is zero"


@given(situations, st.sampled_from([sc.ChunkTopK(1.0, chunk=7), sc.RandomK(1.0), sc.CyclicTopK(1.0)]))
def test_everything_in_fp32_equals_the_dense_sum(situation: Situation, compressor: Compressor) -> None:
    cluster = Cluster(situation.size, situation.numel)
    # A leader never selects zeros, so every element must be nonzero.
    grads = [torch.where(g == 0, torch.ones_like(g), g) for g in situation.grads(0)]
    applied = [g.clone() for g in grads]
    with situation.summing():
        cluster.step(applied, plan(situation.numel, compressor=compressor, collective=collective_of(compressor)))
    mean = total(grads) / situation.size
    allowed = (situation.size + 2) * EPS32 * magnitude(grads) / situation.size
    allowed += rounding_of(situation.dtype, mean) + 2.0**-148
    assert bool(((applied[0].double() - mean).abs() <= allowed).all())
    assert all(bool((r == 0).all()) for r in cluster.residuals)


@given(
    size=st.integers(1, 6),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
    codec=st.sampled_from(ValueCodec),
    compressor=compressors,
)
@settings(max_examples=15)
def test_momentum_correction_conserves_and_masks(
    size: int, momentum: float, nesterov: bool, codec: ValueCodec, compressor: Compressor
) -> None:
    n, cluster = 40, Cluster(size, 40)
    for bucket in cluster.buckets:
        bucket.velocity = torch.zeros(n, dtype=torch.float32)
    velocities = [torch.zeros(n, dtype=torch.float32) for _ in range(size)]
    feedback = MomentumCorrection(momentum, nesterov=nesterov)
    for step in range(4):
        grads = [gradient("normal", n, torch.float32, 100 * step + r) for r in range(size)]
        before = [r.clone() for r in cluster.residuals]
        added = []
        for velocity, grad in zip(velocities, grads, strict=True):
            velocity.mul_(momentum).add_(grad * momentum if nesterov else grad)
            added.append(velocity + grad if nesterov else velocity.clone())
        how = plan(
            n,
            compressor=compressor,
            collective=collective_of(compressor),
            step=step,
            value_codec=codec,
            feedback=feedback,
        )
        with mock.patch.object(dense, "choose_dense", return_value=DenseAlgorithm.RING):
            cluster.step(grads, how)
        assert_conserved(added, before, grads[0], cluster.residuals)
        for bucket, velocity in zip(cluster.buckets, velocities, strict=True):
            assert bucket.velocity is not None
            velocity[(bucket.velocity == 0) & (velocity != 0)] = 0.0  # masked at the positions of sent elements
            torch.testing.assert_close(bucket.velocity, velocity, rtol=1e-5, atol=1e-6)
            assert bool((bucket.velocity[grads[0] != 0] == 0).all()), "sent, so masked"


@given(
    ranks=st.integers(1, 5),
    numel=st.integers(1, 60),
    compressor=compressors,
    dtype=st.sampled_from(GRAD_DTYPES),
    codec=st.sampled_from([ValueCodec.FP16, ValueCodec.BF16]),
    grad_scale=st.sampled_from([1.0, 256.0]),
)
def test_what_is_put_aside_comes_back_and_scales_cancel(
    ranks: int, numel: int, compressor: Compressor, dtype: torch.dtype, codec: ValueCodec, grad_scale: float
) -> None:
    cluster, aside = Cluster(ranks, numel), numel // 2
    for step in range(3):
        kept = [r[:aside].clone() for r in cluster.residuals]
        before = [r.clone() for r in cluster.residuals]
        for b in before:
            b[:aside] = 0.0
        grads = [
            (gradient("normal", numel, torch.float32, 100 * step + r) * grad_scale).to(dtype) for r in range(ranks)
        ]
        for grad in grads:
            grad[:aside] = 0.0
        arrived = [g.float() / grad_scale for g in grads]
        how = plan(
            numel,
            compressor=compressor,
            collective=collective_of(compressor),
            step=step,
            value_codec=codec,
            unused=((0, aside),),
            grad_scale=grad_scale,
        )
        with mock.patch.object(dense, "choose_dense", return_value=DenseAlgorithm.HALVING):
            cluster.step(grads, how)
        assert all(same_bits(g, grads[0]) for g in grads)
        for residual, was in zip(cluster.residuals, kept, strict=True):
            assert torch.equal(residual[:aside], was)
            residual[:aside] = 0.0
        assert_conserved(arrived, before, grads[0] / grad_scale, cluster.residuals)
        for residual, was in zip(cluster.residuals, kept, strict=True):
            residual[:aside] = was


# --- chunks -------------------------------------------------------------------------------------------------------


def test_the_chunks_with_the_largest_summed_norms_are_sent_whole() -> None:
    """The middle chunk is the largest of no single rank, but the largest of the sum. The last chunk is short."""
    cluster = Cluster(2, 10)
    a = torch.tensor([9.0, 0, 0, 0, 4, -4, 0, 0, 1, 1], dtype=torch.float32)
    b = torch.tensor([0.0, 0, 0, 0, 3, -4, 2, 0, 5, 5], dtype=torch.float32)
    grads = [a.clone(), b.clone()]
    how = plan(10, compressor=sc.ChunkTopK(0.34, chunk=4), collective="chunked")
    reports = cluster.step(grads, how)
    assert how.k == 4
    assert grads[0].tolist() == [0, 0, 0, 0, 3.5, -4, 1, 0, 0, 0]
    assert cluster.residuals[0].tolist() == [9, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert cluster.residuals[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 5, 5]
    assert [r.nnz for r in reports] == [4, 4]
    grads = [torch.zeros(10, dtype=torch.float32), torch.zeros(10, dtype=torch.float32)]
    reports = cluster.step(grads, plan(10, compressor=sc.ChunkTopK(0.34, chunk=4), collective="chunked", step=1))
    assert grads[0].tolist() == [0] * 8 + [3, 3], "the short chunk's norm of 12 is the largest now"
    assert [r.nnz for r in reports] == [2, 2]


def test_equal_norms_go_to_the_lowest_chunks_and_zeros_are_not_sent() -> None:
    cluster = Cluster(3, 40)
    grads = [torch.ones(40, dtype=torch.float32) for _ in range(3)]
    cluster.step(grads, plan(40, compressor=sc.ChunkTopK(0.3, chunk=4), collective="chunked"))
    assert grads[0].tolist() == [1.0] * 12 + [0.0] * 28
    cluster = Cluster(3, 40)
    reports = cluster.step(
        [torch.zeros(40, dtype=torch.float32) for _ in range(3)],
        plan(40, compressor=sc.ChunkTopK(1.0, chunk=4), collective="chunked"),
    )
    assert [r.nnz for r in reports] == [0, 0, 0]


def test_a_chunk_longer_than_the_bucket_is_the_bucket() -> None:
    compressor = sc.ChunkTopK(0.001, chunk=1 << 20)
    assert compressor.k_for(100, 0) == compressor.capacity(100, 100) == 100
    assert compressor.k_for(0, 0) == 0
    cluster = Cluster(2, 100)
    grads = [torch.ones(100, dtype=torch.float32), torch.full((100,), 3.0, dtype=torch.float32)]
    cluster.step(grads, plan(100, compressor=compressor, collective="chunked"))
    assert grads[0].tolist() == [2.0] * 100


def test_norms_that_overflow_are_the_largest() -> None:
    norms = torch.tensor([1.0, float("inf"), 3.0, float("inf")], dtype=torch.float32)
    assert largest_chunks(norms, 2).tolist() == [1, 3]


@given(numel=st.integers(1, 50), width=st.integers(1, 60), seed=st.integers(0, 999))
def test_places_pack_and_unpack(numel: int, width: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    total_chunks = -(-numel // width)
    chosen = torch.randperm(total_chunks, generator=g)[: int(torch.randint(total_chunks + 1, (1,), generator=g))]
    places = Places(chosen.sort().values, width, numel)
    source = torch.arange(1.0, numel + 1, dtype=torch.float32)
    expected = [float(i + 1) for i in range(numel) if i // width in chosen.tolist()]
    packed = torch.empty(places.count, dtype=torch.float32)
    places.gather(source, packed)
    assert packed.tolist() == expected == (places.positions() + 1.0).tolist()
    into = torch.zeros(numel, dtype=torch.bfloat16)
    places.put(packed, into)
    assert into[into != 0].tolist() == expected
    places.fill(source, 0.0)
    assert source[source != 0].tolist() == [i + 1 for i in range(numel) if i // width not in chosen.tolist()]


# --- a shared seed ------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 3000))
def test_samples_have_k_different_positions(data: st.DataObject, numel: int) -> None:
    k = data.draw(st.integers(0, numel))
    key = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    drawn = sample(torch.empty(numel, dtype=torch.uint8), k, *key)
    assert drawn.numel() == k
    assert sorted(set(drawn.tolist())) == drawn.tolist()
    assert all(0 <= p < numel for p in drawn.tolist())
    assert torch.equal(drawn, sample(torch.ones(numel, dtype=torch.uint8), k, *key))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_all_subsets_are_equally_likely(k: int) -> None:
    marks, draws = torch.empty(6, dtype=torch.uint8), 3000
    counts = Counter(tuple(sample(marks, k, seed).tolist()) for seed in range(draws))
    subsets = {1: 6, 2: 15, 3: 20, 4: 15, 5: 6}[k]
    assert len(counts) == subsets
    chi_square = sum((c - draws / subsets) ** 2 for c in counts.values()) / (draws / subsets)
    assert chi_square < 2.5 * subsets + 10


def test_a_known_sample_so_that_it_is_the_same_on_all_machines_and_in_all_versions() -> None:
    marks = torch.empty(1_000_000, dtype=torch.uint8)
    assert sample(marks, 5, 0, 1, 2).tolist() == [60120, 202396, 262241, 833377, 853421]


def test_positions_depend_on_seed_step_and_bucket_and_a_resumed_step_has_the_same() -> None:
    def sent(seed: int, step: int, name: str) -> list[int]:
        cluster = Cluster(2, 1000)
        cluster.buckets = [
            BucketMemory(0, layout(1000, name), torch.zeros(1000, dtype=torch.float32)) for _ in range(2)
        ]
        grads = [torch.ones(1000, dtype=torch.float32) for _ in range(2)]
        cluster.step(grads, plan(1000, compressor=sc.RandomK(0.02, seed=seed), collective="shared_index", step=step))
        return grads[0].nonzero().flatten().tolist()

    different = [sent(0, 7, "a"), sent(1, 7, "a"), sent(0, 8, "a"), sent(0, 7, "b")]
    assert all(len(s) == 20 for s in different)
    assert len({tuple(s) for s in different}) == 4
    assert sent(0, 7, "a") == different[0]


def test_random_k_sends_no_positions() -> None:
    cluster = Cluster(2, 100_000)
    grads = [gradient("normal", 100_000, torch.float32, r) for r in range(2)]
    how = plan(100_000, compressor=sc.RandomK(0.5), collective="shared_index", value_codec=ValueCodec.FP16)
    with mock.patch.object(dense, "choose_dense", return_value=DenseAlgorithm.RING):
        reports = cluster.step(grads, how)
    assert all(r.bytes_sent <= 2 * 50_000 + 200 for r in reports), "16 bits each, half of them twice"


# --- a leader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17])
def test_the_leader_changes_with_the_step_and_all_send_what_they_have_there(size: int) -> None:
    n, cluster = 400, Cluster(size, 400)
    for step in range(size + 1):
        grads = [gradient("normal", n, torch.float32, 100 * step + r) for r in range(size)]
        held = [(r + g) for r, g in zip(cluster.residuals, grads, strict=True)]
        how = plan(n, compressor=sc.CyclicTopK(0.05), collective="shared_index", step=step)
        cluster.step(grads, how)
        best = held[step % size].abs().topk(how.k).indices.sort().values
        assert torch.equal(grads[0].nonzero().flatten(), best)
        torch.testing.assert_close(grads[0][best].double(), total(held)[best] / size, rtol=1e-5, atol=1e-6)
        for residual, was in zip(cluster.residuals, held, strict=True):
            expected = was.clone()
            expected[best] = 0.0
            assert torch.equal(residual, expected)


def test_a_leader_with_nothing_sends_nothing() -> None:
    cluster = Cluster(3, 50)
    grads = [
        torch.zeros(50, dtype=torch.float32),
        torch.ones(50, dtype=torch.float32),
        torch.ones(50, dtype=torch.float32),
    ]
    reports = cluster.step(grads, plan(50, compressor=sc.CyclicTopK(0.5), collective="shared_index", step=0))
    assert [r.nnz for r in reports] == [0, 0, 0]
    grads = [torch.zeros(50, dtype=torch.float32) for _ in range(3)]
    cluster.step(grads, plan(50, compressor=sc.CyclicTopK(0.5), collective="shared_index", step=1))
    assert grads[0].tolist() == pytest.approx([2 / 3] * 25 + [0.0] * 25)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13, 33])
def test_a_broadcast_reaches_all_from_any_root(size: int) -> None:
    for root in {0, 1 % size, size // 2, size - 1}:
        world = SimulatedWorld(size)
        data = [torch.full((7,), r, dtype=torch.uint8) for r in range(size)]

        def make(channel: Channel, data: list[torch.Tensor] = data, root: int = root) -> CollectiveSteps[None]:
            return broadcast(channel, data[channel.rank], root)

        world.run(make)
        assert all(d.tolist() == [root] * 7 for d in data)
        sent = [t.messages_sent for t in world.traffic]
        assert sum(sent) == size - 1
        assert max(sent) == sent[root] == (size - 1).bit_length()
