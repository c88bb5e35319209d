"""Chunks and shared indices with failures and disagreements: an error names the rank, and nothing is half-applied."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import Cluster, assert_restored, gradient, plan, same_bits
from hypothesis import given
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.compress import Compressor, SelectionBuffers
from sparsecomm.compress.base import Selection, SelectorMemory
from sparsecomm.errors import CollectiveMismatch, CommTimeout, ConfigError, RemoteError, TransportError, WireError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.types import GRAD_DTYPES, IndexCodec, ValueCodec
from sparsecomm.wire import (
    POSITIONS_HEADER_BYTES,
    decode_positions,
    encode_positions,
    max_positions_bytes,
    read_positions_header,
)

N = 120
COMPRESSORS = [sc.ChunkTopK(0.3, chunk=16), sc.RandomK(0.3), sc.CyclicTopK(0.3)]
each = pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)


def plan_of(compressor: Compressor, **options: Any) -> Any:
    options = {"value_codec": ValueCodec.FP16, "step": 1} | options
    return plan(N, compressor=compressor, collective=compressor.collectives[0], **options)


class Scene:
    """A cluster with filled residuals, and copies of its state before the exchange."""

    def __init__(self, size: int, *, momentum: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.cluster = Cluster(size, N, bucket=4)
        for r, bucket in enumerate(self.cluster.buckets):
            bucket.residual = gradient("normal", N, torch.float32, 50 + r)
            if momentum:
                bucket.velocity = gradient("normal", N, torch.float32, 70 + r)
        self.feedback = {"feedback": sc.MomentumCorrection(0.9)} if momentum else {}
        self.before = [r.clone() for r in self.cluster.residuals]
        self.velocities = [b.velocity.clone() for b in self.cluster.buckets if b.velocity is not None]
        self.sent = [gradient("normal", N, dtype, r) for r in range(size)]
        self.grads = [g.clone() for g in self.sent]

    def assert_restored(self, rank: int) -> None:
        residual = self.cluster.residuals[rank]
        if self.velocities:
            torch.testing.assert_close(residual, self.before[rank], rtol=1e-4, atol=1e-5)
            velocity = self.cluster.buckets[rank].velocity
            torch.testing.assert_close(velocity, self.velocities[rank], rtol=1e-4, atol=1e-5)
        else:
            assert_restored([residual], [self.before[rank]], [self.sent[rank]])

    def assert_untouched(self, rank: int) -> None:
        assert same_bits(self.grads[rank], self.sent[rank]), f"the bucket of rank {rank} was touched"
        self.assert_restored(rank)

    def exchange(self, plans: Any) -> list[Any]:
        return self.cluster.exchange(self.grads, plans)


@each
@pytest.mark.parametrize("size", [1, 2, 3, 17])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", GRAD_DTYPES)
def test_nan_anywhere_is_nan_everywhere_and_residuals_are_as_before(
    compressor: Compressor, size: int, momentum: bool, value: float, dtype: torch.dtype
) -> None:
    scene = Scene(size, momentum=momentum, dtype=dtype)
    culprit = size // 2
    scene.grads[culprit][7] = scene.sent[culprit][7] = value
    reports = scene.exchange(plan_of(compressor, **scene.feedback))
    assert [r.skipped for r in reports] == [1] * size
    assert reports[culprit].nonfinite == 1
    assert all(bool(g.isnan().all()) for g in scene.grads)
    for rank in range(size):
        scene.assert_restored(rank)


@each
def test_a_sum_that_overflows_is_skipped_by_all(compressor: Compressor) -> None:
    cluster = Cluster(4, N)
    grads = [torch.full((N,), 1.5e38, dtype=torch.float32) for _ in range(4)]
    sent = [g.clone() for g in grads]
    reports = cluster.step(grads, plan_of(compressor, value_codec=ValueCodec.FP32))
    assert [r.skipped for r in reports] == [1] * 4
    assert all(bool(g.isnan().all()) for g in grads)
    assert_restored(cluster.residuals, [torch.zeros(N, dtype=torch.float32)] * 4, sent)


@each
def test_an_average_that_a_float16_bucket_cannot_hold_is_skipped(compressor: Compressor) -> None:
    scene = Scene(2, dtype=torch.float16)
    for residual in scene.cluster.residuals:
        residual.fill_(1e5)
    scene.before = [r.clone() for r in scene.cluster.residuals]
    reports = scene.exchange(plan_of(compressor))
    assert [r.skipped for r in reports] == [1, 1]
    assert_restored(scene.cluster.residuals, scene.before, scene.sent)


@each
@pytest.mark.parametrize("momentum", [False, True])
def test_a_step_that_the_optimizer_skips_is_taken_back(compressor: Compressor, momentum: bool) -> None:
    """With a GradScaler, a bucket may have been exchanged before another one turns out to hold NaN."""
    from sparsecomm.exchange import exchange

    scene = Scene(3, momentum=momentum)
    how = plan_of(compressor, **scene.feedback)
    buckets, arenas = scene.cluster.buckets, scene.cluster.arenas
    for skipped in (True, False):
        scene.grads = [g.clone() for g in scene.sent]
        scene.cluster.world.run(
            lambda c: exchange(c, buckets[c.rank], scene.grads[c.rank], replace(how, final=False), arenas[c.rank])
        )
        assert bool(scene.grads[0].any())
        for bucket in buckets:
            bucket.finish_step(skipped=skipped)
        if skipped:
            for rank in range(3):
                assert torch.equal(scene.cluster.residuals[rank], scene.before[rank]), "kept as a copy: exactly"
        else:
            assert not torch.equal(scene.cluster.residuals[0], scene.before[0])


class Failing(sc.CyclicTopK):
    def select(self, *args: Any, **options: Any) -> Selection:
        raise ValueError("out of cheese")


@pytest.mark.parametrize("size", [2, 3, 17])
def test_a_leader_that_fails_is_named_everywhere(size: int) -> None:
    scene = Scene(size)
    outcomes = scene.exchange(plan_of(Failing(0.3)))
    assert isinstance(outcomes[1], ValueError)
    for rank in set(range(size)) - {1}:
        assert isinstance(outcomes[rank], RemoteError)
        assert "rank 1 failed in bucket 4 of step 1: ValueError: out of cheese" in str(outcomes[rank])
    for rank in range(size):
        scene.assert_untouched(rank)


@pytest.mark.parametrize("size", [2, 3, 17])
@pytest.mark.parametrize(
    ("mine", "others", "words"),
    [
        (sc.ChunkTopK(0.3, chunk=8), sc.ChunkTopK(0.3, chunk=4), ["chunk = 8", "chunk = 4", "k = 32", "k = 36"]),
        (sc.ChunkTopK(0.2, chunk=4), sc.ChunkTopK(0.4, chunk=4), ["k = 24", "k = 48"]),
        (sc.RandomK(0.3, seed=1), sc.RandomK(0.3, seed=7), ["seed = 1", "seed = 7"]),
        (sc.RandomK(0.3), sc.RandomK(0.5), ["k = 36", "k = 60"]),
        (sc.RandomK(0.3), sc.CyclicTopK(0.3), ["seed = 0", "seed = none (a rank leads)"]),
        (sc.CyclicTopK(0.3), sc.ChunkTopK(0.3, chunk=4), ["collective = SHARED_INDEX", "collective = CHUNKED"]),
    ],
)
def test_ranks_that_disagree_see_what_each_has(
    size: int, mine: Compressor, others: Compressor, words: list[str]
) -> None:
    scene = Scene(size)
    plans = [plan_of(others)] * size
    plans[-1] = plan_of(mine)
    for outcome in scene.exchange(plans):
        assert isinstance(outcome, CollectiveMismatch)
        assert all(w in str(outcome) for w in words), str(outcome)
    for rank in range(size):
        scene.assert_untouched(rank)


@each
def test_ranks_that_write_values_otherwise_say_so(compressor: Compressor) -> None:
    scene = Scene(2)
    plans = [plan_of(compressor, value_codec=c) for c in (ValueCodec.FP16, ValueCodec.BF16)]
    for outcome in scene.exchange(plans):
        assert isinstance(outcome, CollectiveMismatch)
        assert "rank 1: value_codec = BF16" in str(outcome)


@each
@pytest.mark.parametrize("size", [2, 3, 17])
@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_a_message_that_is_lost_or_cut_leaves_all_as_they_were(compressor: Compressor, size: int, damage: str) -> None:
    for nth in range(12):
        scene = Scene(size)
        seen = 0

        def tamper(source: int, dest: int, message: torch.Tensor, nth: int = nth) -> torch.Tensor | None:
            nonlocal seen
            if source != 1:
                return message
            seen += 1
            if seen != nth + 1:
                return message
            return None if damage == "lost" else message[:-1].clone()

        scene.cluster.world.tamper = tamper
        outcomes = scene.exchange(plan_of(compressor))
        if seen <= nth:
            assert not any(isinstance(o, BaseException) for o in outcomes)
            break
        failed = [r for r, o in enumerate(outcomes) if isinstance(o, BaseException)]
        assert failed
        for rank in failed:
            assert isinstance(outcomes[rank], (CommTimeout, TransportError, WireError))
            scene.assert_untouched(rank)
        good = [r for r in range(size) if r not in failed]
        assert all(same_bits(scene.grads[good[0]], scene.grads[r]) for r in good)
    assert nth >= 2


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("part", ["header", "body"])
@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_damaged_positions_name_the_leader(size: int, part: str, position: float) -> None:
    scene = Scene(size)

    def tamper(source: int, dest: int, message: torch.Tensor) -> torch.Tensor:
        header = message.numel() == POSITIONS_HEADER_BYTES
        if not done and (header if part == "header" else (source, dest) in told):
            done.append(dest)
            message[int(position * (message.numel() - 1))] ^= 64
        if header:
            told.add((source, dest))
        return message

    told: set[tuple[int, int]] = set()
    done: list[int] = []
    scene.cluster.world.tamper = tamper
    outcomes = scene.exchange(plan_of(sc.CyclicTopK(0.3)))
    (victim,) = done
    assert isinstance(outcomes[victim], WireError)
    assert outcomes[victim].rank == 1
    assert outcomes[victim].bucket == 4
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException):
            scene.assert_untouched(rank)


# --- positions as bytes -------------------------------------------------------------------------------------------


def written(numel: int, nnz: int, seed: int, codec: IndexCodec | None) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    indices = torch.randperm(numel, generator=g)[:nnz].sort().values.to(torch.uint32)
    out = torch.zeros(max_positions_bytes(nnz, numel, codec), dtype=torch.uint8)
    return out[: encode_positions(indices, numel, codec, out)].clone(), indices


def read(data: torch.Tensor, numel: int, most: int) -> torch.Tensor:
    header = read_positions_header(data, numel, most)
    body = data[POSITIONS_HEADER_BYTES:]
    if body.numel() != header.index_bytes:
        raise WireError("length", body.numel(), f"not {header.index_bytes}")
    indices = torch.empty(header.nnz, dtype=torch.uint32)
    decode_positions(header, body, numel, indices)
    return indices


@given(
    st.integers(0, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    st.integers(0, 99),
    st.sampled_from([None, *(c for c in IndexCodec if c != IndexCodec.DENSE)]),
    st.data(),
)
def test_positions_come_back_and_any_changed_byte_is_noticed(
    sizes: tuple[int, int], seed: int, codec: IndexCodec | None, data: st.DataObject
) -> None:
    numel, nnz = sizes
    message, indices = written(numel, nnz, seed, codec)
    assert torch.equal(read(message, numel, nnz).long(), indices.long())
    position = data.draw(st.integers(0, message.numel() - 1))
    message[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        read(message, numel, nnz)


@dataclass(frozen=True)
class Field:
    offset: int
    form: str
    value: int
    name: str


@pytest.mark.parametrize(
    "field",
    [
        Field(0, "Q", 11, "nnz"),
        Field(0, "Q", 2**64 - 1, "nnz"),
        Field(8, "Q", 2**63, "index_bytes"),
        Field(16, "B", 5, "index_codec"),
        Field(16, "B", int(IndexCodec.DENSE), "nnz"),
        Field(17, "B", 1, "reserved"),
    ],
    ids=str,
)
def test_hostile_positions_with_a_correct_checksum_are_refused_by_field(field: Field) -> None:
    message, _ = written(1000, 10, 1, IndexCodec.RICE)
    struct.pack_into("<" + field.form, message.numpy(), field.offset, field.value)
    struct.pack_into("<I", message.numpy(), 28, kernels.crc32c(message[:28]))
    with pytest.raises(WireError) as caught:
        read_positions_header(message, 1000, 10)
    assert caught.value.field == field.name


def test_a_short_header_of_positions_is_refused() -> None:
    with pytest.raises(WireError, match="length = 31"):
        read_positions_header(torch.zeros(31, dtype=torch.uint8), 10, 1)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sc.ChunkTopK(0.1, chunk=0), ["ChunkTopK.chunk", "0"]),
        (lambda: sc.ChunkTopK(0.1, chunk=-3), ["ChunkTopK.chunk", "-3"]),
        (lambda: sc.ChunkTopK(0.1, chunk=2**32), ["ChunkTopK.chunk", str(2**32)]),
        (lambda: sc.ChunkTopK(0.1, chunk=1.5), ["ChunkTopK.chunk", "1.5"]),
        (lambda: sc.ChunkTopK(0.1, chunk=True), ["ChunkTopK.chunk", "True"]),
        (lambda: sc.ChunkTopK(0.0), ["density", "0.0"]),
        (lambda: sc.RandomK(0.1, seed=-1), ["RandomK.seed", "-1"]),
        (lambda: sc.RandomK(0.1, seed="a"), ["RandomK.seed", "'a'"]),
        (lambda: sc.CyclicTopK(2.0), ["density", "2.0"]),
        (lambda: SparseConfig(compressor=sc.ChunkTopK(0.1), collective="allgather"), ["'allgather'", "'chunked'"]),
        (lambda: SparseConfig(compressor=sc.RandomK(0.1), collective="split_reduce"), ["RandomK", "'shared_index'"]),
        (lambda: SparseConfig(compressor=sc.CyclicTopK(0.1), collective="chunked"), ["CyclicTopK", "'shared_index'"]),
        (lambda: SparseConfig(compressor=sc.TopK(0.1), collective="chunked"), ["'chunked'", "TopK"]),
        (lambda: SparseConfig(compressor=sc.TopK(0.1), collective="shared_index"), ["'shared_index'", "TopK"]),
    ],
)
def test_bad_options_are_named(make: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(w in str(caught.value) for w in words), str(caught.value)


@pytest.mark.parametrize(("collective", "kind"), [("chunked", "ChunkTopK"), ("shared_index", "RandomK or CyclicTopK")])
def test_a_compressor_that_only_says_that_it_fits_is_refused_on_all_ranks(collective: str, kind: str) -> None:
    class Pretender(sc.TopK):
        collectives = (collective,)

    scene = Scene(2)
    outcomes = scene.exchange([plan_of(Pretender(0.3)), plan_of(Pretender(0.3))])
    assert all(isinstance(o, (ConfigError, RemoteError)) for o in outcomes)
    assert f"needs a {kind}" in str(outcomes[0])
    scene.assert_untouched(0)


def test_auto_is_the_collective_that_fits_and_dense_always_does() -> None:
    for compressor in COMPRESSORS:
        name = compressor.collectives[0]
        auto = SparseConfig(compressor=compressor)
        assert auto.method == SparseConfig(compressor=compressor, collective=name).method
        assert SparseConfig(compressor=compressor, collective="dense").method == "dense"
        assert auto.change(density=0.5).compressor == replace(compressor, density=0.5)


def test_presets_of_the_papers() -> None:
    flow = sc.preset("gradientflow", steps_per_epoch=10)
    assert isinstance(flow.compressor, sc.ChunkTopK)
    assert isinstance(flow.feedback, sc.MomentumCorrection)
    densities = [flow.compressor.density_at(step) for step in (0, 10, 20, 1000)]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[-1] == 0.1
    assert sc.preset("scalecom", density=0.02).compressor == sc.CyclicTopK(0.02)


# --- alone --------------------------------------------------------------------------------------------------------


@given(
    compressor=st.sampled_from(COMPRESSORS),
    numel=st.integers(1, 200),
    dtype=st.sampled_from(GRAD_DTYPES),
    scale=st.sampled_from([1.0, 0.5]),
    bad=st.booleans(),
)
def test_select_by_itself_takes_what_it_says(
    compressor: Compressor, numel: int, dtype: torch.dtype, scale: float, bad: bool
) -> None:
    grad, residual = gradient("normal", numel, dtype, 1), gradient("normal", numel, torch.float32, 2)
    if bad:
        grad[numel // 2] = float("inf")
    before = residual.clone()
    k = compressor.k_for(numel, 0)
    room = compressor.capacity(k, numel)
    out = SelectionBuffers(torch.empty(room, dtype=torch.uint32), torch.empty(room, dtype=torch.float32))
    done = compressor.select(grad, residual, k, SelectorMemory(), out, scale=scale)
    indices = out.indices[: done.nnz].long()
    assert done.nonfinite == bad
    back = residual.clone()
    back[indices] += out.values[: done.nnz]
    accumulated = before + grad.float() * scale
    if bad:
        accumulated[numel // 2] = before[numel // 2]
        assert numel // 2 not in indices.tolist()
    assert torch.equal(back, accumulated)
    assert bool((residual[indices] == 0).all())
