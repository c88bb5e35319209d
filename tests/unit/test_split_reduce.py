"""Split-reduce in simulated worlds: the invariants of all exchanges, and those of regions and thresholds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import (
    EPS32,
    KINDS,
    Cluster,
    assert_conserved,
    gradient,
    magnitude,
    plan,
    rounding_of,
    same_bits,
    total,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomm.compress import Compressor, ThresholdTopK, TopK
from sparsecomm.errors import CollectiveMismatch
from sparsecomm.exchange.methods.split_reduce.regions import LIFETIME, Regions
from sparsecomm.exchange.methods.split_reduce.segments import segments_of
from sparsecomm.feedback import MomentumCorrection
from sparsecomm.types import GRAD_DTYPES, IndexCodec, ValueCodec

INDEX_CODECS = (None, IndexCodec.RICE, IndexCodec.BITPACK, IndexCodec.BITMAP, IndexCodec.RAW)
SPLITS = ("split_reduce", "ssar")


@dataclass(frozen=True)
class Situation:
    """P ranks with gradients of some kinds, equal on all ranks if `alike`."""

    size: int
    numel: int
    dtype: torch.dtype
    kinds: tuple[str, ...]
    alike: bool
    seed: int

    def grads(self, step: int) -> list[torch.Tensor]:
        return [
            gradient(
                self.kinds[r % len(self.kinds)], self.numel, self.dtype, self.seed + 1000 * step + r * (not self.alike)
            )
            for r in range(self.size)
        ]


situations = st.builds(
    Situation,
    size=st.integers(1, 16) | st.sampled_from([17, 19]),
    numel=st.sampled_from([1, 2, 3, 7, 128, 300]) | st.integers(1, 400),
    dtype=st.sampled_from(GRAD_DTYPES),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    alike=st.booleans(),
    seed=st.integers(0, 2**31),
)
compressors = st.sampled_from([0.001, 0.01, 0.1, 0.7, 1.0]).flatmap(
    lambda d: st.sampled_from([TopK(d), ThresholdTopK(d, interval=2)])
)


@given(situations, compressors, st.sampled_from(ValueCodec), st.sampled_from(INDEX_CODECS), st.sampled_from(SPLITS))
def test_steps_conserve_and_replicas_agree(
    situation: Situation,
    compressor: Compressor,
    value_codec: ValueCodec,
    index_codec: IndexCodec | None,
    collective: str,
) -> None:
    cluster = Cluster(situation.size, situation.numel)
    for step in range(4):
        grads = situation.grads(step)
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        how = plan(
            situation.numel,
            compressor=compressor,
            step=step,
            value_codec=value_codec,
            index_codec=index_codec,
            collective=collective,
        )
        cluster.step(applied, how)
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert_conserved(grads, before, applied[0], cluster.residuals)
        assert len({b.shared.tag for b in cluster.buckets}) == 1, "all ranks remember the same"


@given(situations, st.sampled_from([None, IndexCodec.RICE, IndexCodec.RAW]))
@settings(max_examples=15)
def test_ssar_of_everything_equals_the_sum(situation: Situation, index_codec: IndexCodec | None) -> None:
    cluster = Cluster(situation.size, situation.numel)
    for step in range(2):
        grads = situation.grads(step)
        applied = [g.clone() for g in grads]
        cluster.step(applied, plan(situation.numel, density=1.0, step=step, collective="ssar", index_codec=index_codec))
        mean = total(grads) / situation.size
        allowed = (situation.size + 2) * EPS32 * magnitude(grads) / situation.size
        allowed += rounding_of(situation.dtype, mean) + 2.0**-148
        assert bool(((applied[0].double() - mean).abs() <= allowed).all())
        assert all(bool((r == 0).all()) for r in cluster.residuals)


@given(situations, st.sampled_from([0.01, 0.2, 1.0]))
@settings(max_examples=12)
def test_ssar_without_rounding_is_the_allgather_to_the_bit(situation: Situation, density: float) -> None:
    """Every owner adds in rank order."""
    ours, other = Cluster(situation.size, situation.numel), Cluster(situation.size, situation.numel)
    for step in range(3):
        a, b = situation.grads(step), situation.grads(step)
        ours.step(a, plan(situation.numel, density=density, step=step, collective="ssar"))
        other.step(b, plan(situation.numel, density=density, step=step))
        assert torch.equal(a[0], b[0])
        for mine, theirs in zip(ours.residuals, other.residuals, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("collective", SPLITS)
def test_nothing_to_send_anywhere(size: int, collective: str) -> None:
    cluster = Cluster(size, 1000)
    for step in range(2):
        grads = [torch.zeros(1000, dtype=torch.float32) for _ in range(size)]
        reports = cluster.step(grads, plan(1000, step=step, collective=collective))
        assert all(bool((g == 0).all()) for g in grads)
        assert [r.nnz for r in reports] == [0] * size


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("collective", SPLITS)
def test_one_rank_with_nothing_to_send(size: int, collective: str) -> None:
    cluster = Cluster(size, 100)
    for step in range(2):
        grads = [
            torch.zeros(100, dtype=torch.float32) if r == 1 else torch.ones(100, dtype=torch.float32)
            for r in range(size)
        ]
        cluster.step(grads, plan(100, density=1.0, step=step, collective=collective))
        torch.testing.assert_close(grads[1], torch.full((100,), (size - 1) / size, dtype=torch.float32))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 16])
def test_about_k_of_the_sums_are_kept_and_they_are_the_largest(size: int) -> None:
    n, cluster = 20_000, Cluster(size, 20_000)
    shared = gradient("normal", n, torch.float32, 5)
    for step in range(6):
        grads = [shared + gradient("normal", n, torch.float32, 100 * step + r) for r in range(size)]
        held = [(r + g).double() for r, g in zip(cluster.residuals, grads, strict=True)]
        how = plan(n, density=0.01, step=step, collective="split_reduce")
        cluster.step(grads, how)
        kept = grads[0].nonzero().flatten()
        assert 0.6 * how.k <= len(kept) <= 1.4 * how.k
        sums = torch.zeros(n, dtype=torch.float64)
        for acc in held:
            best = acc.abs().topk(how.k).indices
            sums.index_add_(0, best, acc[best])
        best = set(sums.abs().topk(how.k).indices.tolist())
        assert len(best & set(kept.tolist())) >= 0.8 * min(len(best), len(kept))


def test_gradients_that_grow_a_thousandfold_do_not_flood_the_gather() -> None:
    n, cluster = 10_000, Cluster(4, 10_000)
    for step, scale in enumerate([1.0, 1.0, 1000.0, 1.0, 1e-3]):
        for r in cluster.residuals:
            r.zero_()
        grads = [gradient("normal", n, torch.float32, 10 * step + r) * scale for r in range(4)]
        cluster.step(grads, plan(n, density=0.02, step=step, collective="split_reduce"))
        assert 100 <= int(grads[0].count_nonzero()) <= 300, "k = 200"


def test_a_full_region_is_gathered_without_positions() -> None:
    """DSAR: in a nearly full fp32 region, sending the few zeros costs less than one bit per position."""
    numel, size = 4000, 2
    cluster = Cluster(size, numel)
    grads = [gradient("normal", numel, torch.float32, r) for r in range(size)]
    for g in grads:
        g[::200] = 0.0
    mean = total(grads) / size
    reports = cluster.step(grads, plan(numel, density=1.0, collective="ssar"))
    torch.testing.assert_close(grads[0].double(), mean, rtol=1e-6, atol=1e-7)
    # Step 0 makes regions. Each rank sends half of the vector twice: first a part, then sums.
    parts = reports[0].bytes_sent - 4 * numel
    assert parts < numel // 16 + 1000, "positions of one leg only, a bit each, and headers"


@given(
    size=st.integers(1, 6),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
    codec=st.sampled_from(ValueCodec),
    collective=st.sampled_from(SPLITS),
)
def test_momentum_correction_conserves_the_accumulated_velocities(
    size: int, momentum: float, nesterov: bool, codec: ValueCodec, collective: str
) -> None:
    n = 80
    options = MomentumCorrection(momentum=momentum, nesterov=nesterov, masking=False)
    cluster = Cluster(size, n)
    for bucket in cluster.buckets:
        bucket.velocity = torch.zeros(n, dtype=torch.float32)
    came_in, went_out = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    velocity = [torch.zeros(n, dtype=torch.float64) for _ in range(size)]
    for step in range(5):
        grads = [gradient("normal", n, torch.float32, 10 * step + r) for r in range(size)]
        for r, g in enumerate(grads):
            velocity[r] = momentum * (velocity[r] + g) if nesterov else momentum * velocity[r] + g
            came_in += velocity[r] + g if nesterov else velocity[r]
        cluster.step(grads, plan(n, step=step, feedback=options, value_codec=codec, collective=collective))
        went_out += size * grads[0].double()
    torch.testing.assert_close(went_out + total(cluster.residuals), came_in, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("collective", SPLITS)
@pytest.mark.parametrize("codec", ValueCodec)
def test_what_an_owner_drops_in_a_span_it_did_not_use_is_kept(collective: str, codec: ValueCodec) -> None:
    """The memory of that span is set aside during the exchange, and must be added to the dropped sums."""
    n, size = 64, 3
    cluster = Cluster(size, n)
    for step in range(6):
        grads = [gradient("normal", n, torch.float32, 10 * step + r) for r in range(size)]
        plans = []
        for r in range(size):
            held = ((0, 40),) if (r + step) % 2 else ()
            for start, end in held:
                grads[r][start:end] = 0.0
            plans.append(plan(n, density=0.3, step=step, value_codec=codec, collective=collective, unused=held))
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        cluster.step(applied, plans)
        assert_conserved(grads, before, applied[0], cluster.residuals)


# --- regions ------------------------------------------------------------------------------------------------------


def regions_of(cluster: Cluster) -> Regions:
    shared = cluster.buckets[0].shared
    assert isinstance(shared, Regions)
    return shared


def run(cluster: Cluster, step: int, *, density: float = 0.1, collective: str = "split_reduce") -> None:
    grads = [gradient("normal", cluster.numel, torch.float32, 10 * step + r) for r in range(cluster.size)]
    before = [r.clone() for r in cluster.residuals]
    applied = [g.clone() for g in grads]
    cluster.step(applied, plan(cluster.numel, density=density, step=step, collective=collective))
    assert_conserved(grads, before, applied[0], cluster.residuals)


def test_regions_live_64_steps() -> None:
    cluster = Cluster(3, 200)
    made = []
    for step in range(5, 5 + LIFETIME + 2):
        run(cluster, step)
        made.append(regions_of(cluster).made)
    assert made == [5] * LIFETIME + [5 + LIFETIME] * 2


@pytest.mark.parametrize("size", [3, 17])
def test_regions_are_made_again_when_steps_are_missing_or_k_changes_much(size: int) -> None:
    cluster = Cluster(size, 200)
    for step, density, made in [(0, 0.1, 0), (1, 0.1, 0), (3, 0.1, 3), (4, 0.12, 3), (5, 0.5, 5), (2, 0.5, 2)]:
        run(cluster, step, density=density)
        assert regions_of(cluster).made == made


@pytest.mark.parametrize("size", [2, 3, 16, 17, 20])
def test_a_rank_with_other_regions_is_noticed_and_all_make_new_ones(size: int) -> None:
    cluster = Cluster(size, 200)
    run(cluster, 0)
    run(cluster, 1)
    odd = cluster.buckets[size - 1]
    mine = regions_of(cluster)
    bounds = mine.bounds.copy()
    bounds[1] += 1
    odd.shared = Regions(bounds, mine.owners, mine.k, mine.made, mine.used, mine.threshold)
    run(cluster, 2)
    assert [b.shared.made for b in cluster.buckets] == [2] * size
    odd.shared = None
    run(cluster, 3)
    assert [b.shared.made for b in cluster.buckets] == [3] * size
    run(cluster, 4)
    assert [b.shared.made for b in cluster.buckets] == [3] * size


@pytest.mark.parametrize("size", [2, 5, 17])
def test_ranks_with_different_k_are_told_so(size: int) -> None:
    cluster = Cluster(size, 100)
    plans = [plan(100, density=0.2 if r else 0.1, collective="split_reduce") for r in range(size)]
    outcomes = cluster.exchange([torch.ones(100, dtype=torch.float32) for _ in range(size)], plans)
    for outcome in outcomes:
        assert isinstance(outcome, CollectiveMismatch)
        assert "rank 0: k = 10" in str(outcome)
        assert "rank 1: k = 20" in str(outcome)


def where(kind: str, rank: int, size: int, numel: int, step: int) -> torch.Tensor:
    """A gradient whose large elements are in one span of the bucket, or everywhere."""
    grad = 1e-3 * gradient("normal", numel, torch.float32, 31 * step + rank)
    start, end = {
        "random": (0, numel),
        "clustered": (numel * rank // size, numel * (rank + 1) // size),
        "adversarial": (numel // 2, numel // 2 + numel // 25),
    }[kind]
    grad[start:end] = gradient("normal", end - start, torch.float32, 77 * step + rank)
    return grad


@pytest.mark.parametrize("kind", ["random", "clustered", "adversarial"])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_bytes_are_balanced_and_do_not_grow_with_the_world(kind: str, size: int) -> None:
    numel = 200_000
    cluster = Cluster(size, numel)
    for step in range(4):
        grads = [where(kind, r, size, numel, step) for r in range(size)]
        how = plan(numel, density=0.01, step=step, value_codec=ValueCodec.FP16, collective="split_reduce")
        reports = cluster.step(grads, how)
        if step:
            moved = [r.bytes_sent + r.bytes_received for r in reports]
            assert max(moved) * size / sum(moved) <= 1.2
            words = max(max(r.bytes_sent, r.bytes_received) for r in reports) / 4
            assert words <= 3.0 * how.k * (size - 1) / size


def test_all_that_is_kept_in_one_region_is_moved_so_that_all_send_alike() -> None:
    """The regions come from an earlier step, and now all large elements lie in one of them."""
    numel, size = 64_000, 8
    cluster = Cluster(size, numel)
    reports = []
    for step in range(2):
        grads = [gradient("normal", numel, torch.float32, 10 * step + r) for r in range(size)]
        for g in grads:
            g[: numel // size] *= 1000.0 if step else 1.0
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        reports = cluster.step(applied, plan(numel, density=0.05, step=step, collective="split_reduce"))
        assert_conserved(grads, before, applied[0], cluster.residuals)
        assert all(same_bits(applied[0], other) for other in applied[1:])
    sent = [r.bytes_sent for r in reports]
    # With the old regions, one rank owns all k = 3200 kept sums, of at most 8 bytes each. It must not send all of them
    # to every other rank, but only once, and the other ranks must send as much.
    assert max(sent) < 2.5 * 8 * 3200
    assert min(sent) > 4 * 3200


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.booleans())
def test_segments_cover_everything_once_and_evenly(counts: list[int], even: bool) -> None:
    size = len(counts)
    owners = np.random.default_rng(sum(counts)).permutation(size).tolist()
    segments = segments_of(counts, owners, even=even)
    covered = [(s.region, i) for s in segments for i in range(s.first, s.last)]
    assert covered == [(g, i) for g, count in enumerate(counts) for i in range(count)]
    assert all(s.owner == owners[s.region] for s in segments)
    held = [sum(s.count for s in segments if s.holder == r) for r in range(size)]
    if even:
        assert max(held) - min(held) <= 1
        assert len(segments) < 2 * size
    else:
        assert held == [counts[owners.index(r)] for r in range(size)]


@pytest.mark.parametrize(("numel", "k"), [(0, 0), (1, 0), (50, 0), (50, 50), (50, 49), (3, 1)])
@pytest.mark.parametrize("size", [1, 2, 5, 17])
@pytest.mark.parametrize("collective", SPLITS)
def test_any_k_of_any_bucket(numel: int, k: int, size: int, collective: str) -> None:
    cluster = Cluster(size, numel)
    for step in range(3):
        grads = [gradient("normal", numel, torch.float32, 10 * step + r) for r in range(size)]
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        cluster.step(applied, replace(plan(numel, step=step, collective=collective), k=k))
        assert all(same_bits(applied[0], other) for other in applied[1:])
        if numel:
            assert_conserved(grads, before, applied[0], cluster.residuals)
        if k == 0:
            assert not bool(applied[0].any())
