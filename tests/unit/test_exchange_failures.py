"""Ranks that disagree, fail or lie: every rank raises an error with rank and cause, and nothing is half-applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import Cluster, Raising, assert_conserved, assert_restored, gradient, layout, plan, same_bits

from sparsecomm.errors import CollectiveMismatch, CommTimeout, KernelError, RemoteError, TransportError, WireError
from sparsecomm.exchange import Plan, blank_header, exchange, report_failure
from sparsecomm.exchange.agree import agree
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import BucketMemory
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps
from sparsecomm.types import IndexCodec
from sparsecomm.wire import HEADER_BYTES, Header, known_rules, read_header, write_header

SIZES = (2, 3, 5, 8)
N = 60


class Scene:
    """A cluster with filled residuals, and copies of its state before the exchange."""

    def __init__(
        self, size: int, *, residual: bool = True, bucket: int = 4, dtype: torch.dtype = torch.float32
    ) -> None:
        self.cluster = Cluster(size, N, residual=residual, bucket=bucket)
        for r, residual_of_r in enumerate(self.cluster.residuals):
            residual_of_r.copy_(gradient("normal", N, torch.float32, 50 + r))
        self.before = [r.clone() for r in self.cluster.residuals]
        self.grads = [gradient("normal", N, dtype, r) for r in range(size)]
        self.sent = [g.clone() for g in self.grads]

    def assert_untouched(self, rank: int) -> None:
        assert same_bits(self.grads[rank], self.sent[rank]), f"the bucket of rank {rank} was touched"
        if self.before:
            assert_restored([self.cluster.residuals[rank]], [self.before[rank]], [self.sent[rank]])

    def assert_all_untouched(self) -> None:
        for rank in range(self.cluster.size):
            self.assert_untouched(rank)


def changed_layout(scene: Scene, rank: int) -> None:
    bucket = scene.cluster.buckets[rank]
    scene.cluster.buckets[rank] = BucketMemory(bucket.index, layout(N, "another"), bucket.residual)


def changed_bucket(scene: Scene, rank: int) -> None:
    bucket = scene.cluster.buckets[rank]
    scene.cluster.buckets[rank] = BucketMemory(9, bucket.layout, bucket.residual)


def changed_numel(scene: Scene, rank: int) -> None:
    scene.cluster.buckets[rank] = BucketMemory(4, layout(N - 1), scene.before[rank][: N - 1].clone())
    scene.before[rank] = scene.before[rank][: N - 1]
    scene.grads[rank] = scene.sent[rank][: N - 1].clone()
    scene.sent[rank] = scene.sent[rank][: N - 1]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("change", "field", "values"),
    [
        (changed_layout, "layout_hash", [f"{layout(N).hash:#018x}", f"{layout(N, 'another').hash:#018x}"]),
        (changed_bucket, "bucket", ["bucket = 4", "bucket = 9"]),
        (changed_numel, "numel", [f"numel = {N}", f"numel = {N - 1}"]),
    ],
)
def test_ranks_with_different_buckets_all_see_both_values(
    dense: bool, size: int, change: Callable[[Scene, int], None], field: str, values: list[str]
) -> None:
    scene = Scene(size)
    change(scene, size - 1)
    outcomes = scene.cluster.exchange(scene.grads, plan(N, dense=dense, step=12))
    for outcome in outcomes:
        assert isinstance(outcome, CollectiveMismatch)
        assert field in str(outcome)
        assert f"rank {size - 1}" in str(outcome)
        assert all(v in str(outcome) for v in values), str(outcome)
    scene.assert_all_untouched()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("mine", "others", "words"),
    [
        (plan(N, step=8), plan(N, step=7), ["step = 8", "step = 7"]),
        (plan(N, dense=True), plan(N), ["collective = DENSE", "collective = ALLGATHER"]),
    ],
)
def test_ranks_with_different_plans_all_see_both_values(size: int, mine: Plan, others: Plan, words: list[str]) -> None:
    scene = Scene(size)
    outcomes = scene.cluster.exchange(scene.grads, [mine] + [others] * (size - 1))
    for outcome in outcomes:
        assert isinstance(outcome, CollectiveMismatch)
        assert all(w in str(outcome) for w in words), str(outcome)
    scene.assert_all_untouched()


def test_ranks_with_different_worlds_all_see_both_sizes() -> None:
    def make(channel: Channel) -> CollectiveSteps[list[Header]]:
        payload = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        mine = blank_header(channel.rank, channel.size + channel.rank, 0, 0, N, method_named("dense").number)
        write_header(mine, payload)
        return agree(channel, mine, payload, Arena(), 0)

    for outcome in Cluster(3, N).world.run(make, return_exceptions=True):
        assert isinstance(outcome, AgreedError)
        assert isinstance(outcome.cause, CollectiveMismatch)
        assert all(f"world = {w}" in str(outcome) for w in (3, 4, 5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dense", [False, True])
def test_a_rank_that_fails_before_sending_is_named_everywhere(size: int, dense: bool) -> None:
    """The failed rank calls report_failure while the others call exchange."""
    scene = Scene(size)
    culprit = size // 2
    cause = ValueError("the cat sat on the gradient")

    def make(channel: Channel) -> CollectiveSteps[object]:
        r = channel.rank
        if r == culprit:
            header = blank_header(r, size, 4, 3, N, method_named("dense").number)
            return report_failure(channel, header, cause, scene.cluster.arenas[r])
        how = plan(N, dense=dense, step=3)
        return exchange(channel, scene.cluster.buckets[r], scene.grads[r], how, scene.cluster.arenas[r])

    outcomes = scene.cluster.world.run(make, return_exceptions=True)
    assert all(isinstance(o, AgreedError) for o in outcomes)
    for rank, outcome in enumerate(outcomes):
        if rank == culprit:
            assert outcome.cause is cause
        else:
            assert isinstance(outcome.cause, RemoteError)
            text = str(outcome.cause)
            assert f"rank {culprit} failed in bucket 4 of step 3: ValueError: the cat sat on the gradient" in text
    scene.assert_all_untouched()


@pytest.mark.parametrize("size", SIZES)
def test_a_compressor_that_raises_is_its_ranks_own_error_and_a_remote_one_elsewhere(size: int) -> None:
    scene = Scene(size)
    plans = [plan(N) for _ in range(size)]
    plans[1] = replace(plans[1], compressor=Raising("out of cheese"))
    outcomes = scene.cluster.exchange(scene.grads, plans)
    assert isinstance(outcomes[1], ValueError)
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            assert isinstance(outcome, RemoteError)
            assert "rank 1 failed in bucket 4 of step 0: ValueError: out of cheese" in str(outcome)
    scene.assert_all_untouched()


@pytest.mark.parametrize("size", SIZES)
def test_an_encoder_that_raises_after_selection_restores_the_residual(size: int) -> None:
    scene = Scene(size)
    plans = [plan(N) for _ in range(size)]
    plans[0] = replace(plans[0], index_codec=IndexCodec.DENSE)  # refused, since not every element is sent
    outcomes = scene.cluster.exchange(scene.grads, plans)
    assert isinstance(outcomes[0], KernelError)
    assert all(isinstance(o, RemoteError) for o in outcomes[1:])
    scene.assert_all_untouched()


def test_several_ranks_that_fail_are_all_named() -> None:
    scene = Scene(4)
    plans = [plan(N) for _ in range(4)]
    for r in (1, 3):
        plans[r] = replace(plans[r], compressor=Raising(f"reason {r}"))
    outcomes = scene.cluster.exchange(scene.grads, plans)
    for r in (0, 2):
        assert "rank 1 failed" in str(outcomes[r])
        assert "reason 1" in str(outcomes[r])
        assert "rank 3 failed" in str(outcomes[r])
        assert "reason 3" in str(outcomes[r])


@pytest.mark.parametrize("message", ["", "x" * 100_000, "naïve 漢字 " * 1000, "\x00\n\r"])
def test_any_error_message_travels(message: str) -> None:
    scene = Scene(3)
    plans = [plan(N) for _ in range(3)]
    plans[2] = replace(plans[2], compressor=Raising(message))
    outcomes = scene.cluster.exchange(scene.grads, plans)
    for outcome in outcomes[:2]:
        assert isinstance(outcome, RemoteError)
        assert f"rank 2 failed in bucket 4 of step 0: ValueError: {message[:100]}" in str(outcome)
    scene.assert_all_untouched()


def test_a_lone_rank_sees_its_own_error() -> None:
    scene = Scene(1)
    outcomes = scene.cluster.exchange(scene.grads, replace(plan(N), compressor=Raising("alone")))
    assert isinstance(outcomes[0], ValueError)
    scene.assert_all_untouched()


@pytest.mark.parametrize("dense", [False, True])
def test_after_an_agreed_failure_the_next_step_works_and_conserves(dense: bool) -> None:
    scene = Scene(3)
    plans = [plan(N, dense=dense) for _ in range(3)]
    plans[1] = replace(plans[1], step=99)
    scene.cluster.exchange(scene.grads, plans)
    before = [r.clone() for r in scene.cluster.residuals]
    scene.cluster.step(scene.grads, plan(N, dense=dense, step=1))
    assert_conserved(scene.sent, before, scene.grads[0], scene.cluster.residuals)


# --- damaged messages ---------------------------------------------------------------------------------------------


class Tamper:
    """Changes the n-th message from a source to a destination."""

    def __init__(self, source: int, dest: int, nth: int, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        self.key, self.nth, self.change, self.seen = (source, dest), nth, change, 0

    def __call__(self, source: int, dest: int, message: torch.Tensor) -> torch.Tensor | None:
        if (source, dest) != self.key:
            return message
        self.seen += 1
        return self.change(message) if self.seen == self.nth + 1 else message


def flip(bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(message: torch.Tensor) -> torch.Tensor:
        message[bit // 8 % message.numel()] ^= 1 << bit % 8
        return message

    return change


def cut(message: torch.Tensor) -> torch.Tensor:
    return message[:-1].clone()


def lose(message: torch.Tensor) -> None:
    return None


def assert_only_survivors_were_applied(scene: Scene, outcomes: list[object]) -> None:
    """Failed ranks have their old state, and all others have the same complete result."""
    good = [r for r, o in enumerate(outcomes) if not isinstance(o, BaseException)]
    for rank in range(scene.cluster.size):
        if rank not in good:
            scene.assert_untouched(rank)
    assert all(same_bits(scene.grads[good[0]], scene.grads[r]) for r in good[1:])


@pytest.mark.parametrize("bit", [0, 7, 50, 101])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_flipped_bit_in_a_body_names_sender_and_bucket(size: int, bit: int) -> None:
    scene = Scene(size)
    rounds = (size - 1).bit_length()  # rank 1 sends to rank 0 in the first round of headers, then its body
    scene.cluster.world.tamper = Tamper(1, 0, 1 if size > 2 else rounds, flip(bit))
    outcomes = scene.cluster.exchange(scene.grads, plan(N))
    assert isinstance(outcomes[0], WireError)
    assert (outcomes[0].rank, outcomes[0].bucket) == (1, 4)
    assert outcomes[0].field == "body_crc"
    assert not any(isinstance(o, BaseException) for o in outcomes[1:])
    assert_only_survivors_were_applied(scene, outcomes)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("byte", [0, 4, 12, 20, 50, 87])
@pytest.mark.parametrize("size", [2, 3])
def test_a_flipped_bit_in_a_header_names_sender_and_bucket(size: int, byte: int, dense: bool) -> None:
    scene = Scene(size)
    scene.cluster.world.tamper = Tamper(1, 0, 0, flip(8 * byte))
    outcomes = scene.cluster.exchange(scene.grads, plan(N, dense=dense))
    assert isinstance(outcomes[0], WireError)
    assert outcomes[0].rank == 1, str(outcomes[0])
    assert outcomes[0].bucket == 4, str(outcomes[0])
    assert all(isinstance(o, (WireError, CommTimeout)) for o in outcomes if isinstance(o, BaseException))
    assert_only_survivors_were_applied(scene, outcomes)


@pytest.mark.parametrize(("dense", "residual"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nth", range(5))
@pytest.mark.parametrize("size", [2, 3])
def test_a_lost_message_leaves_every_failed_rank_as_it_was(
    size: int, nth: int, dtype: torch.dtype, residual: bool, dense: bool
) -> None:
    scene = Scene(size, residual=residual, dtype=dtype)
    tamper = scene.cluster.world.tamper = Tamper(1, 0, nth, lose)
    outcomes = scene.cluster.exchange(scene.grads, plan(N, dense=dense))
    if tamper.seen > nth:
        assert any(isinstance(o, CommTimeout) for o in outcomes)
        assert "from rank 1" in str(outcomes[0])
    failed = [r for r, o in enumerate(outcomes) if isinstance(o, BaseException)]
    for rank in failed:
        # A partial dense sum must not pass for a gradient: the bucket holds the old gradient or NaN.
        assert same_bits(scene.grads[rank], scene.sent[rank]) or bool(scene.grads[rank].isnan().all())
        if residual:
            assert_restored([scene.cluster.residuals[rank]], [scene.before[rank]], [scene.sent[rank]])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_shortened_message_is_a_transport_error_that_names_the_sender(nth: int, dense: bool) -> None:
    scene = Scene(2)
    scene.cluster.world.tamper = Tamper(1, 0, nth, cut)
    outcomes = scene.cluster.exchange(scene.grads, plan(N, dense=dense))
    assert isinstance(outcomes[0], TransportError)
    assert "from rank 1" in str(outcomes[0])
    scene.assert_untouched(0)


def test_a_payload_under_another_ranks_name_is_refused() -> None:
    def impersonate(message: torch.Tensor) -> torch.Tensor:
        write_header(replace(read_header(message), rank=0), message)
        return message

    scene = Scene(2)
    scene.cluster.world.tamper = Tamper(1, 0, 0, impersonate)
    outcomes = scene.cluster.exchange(scene.grads, plan(N))
    assert isinstance(outcomes[0], WireError)  # no AgreedError, since only this rank knows
    assert "rank 1" in str(outcomes[0])
    scene.assert_untouched(0)


def test_the_collective_kinds_are_those_of_the_document() -> None:
    assert {rules.label: rules.number for rules in known_rules()} == {
        "ALLGATHER": 1,
        "DENSE": 2,
        "SPLIT_REDUCE": 3,
        "SSAR": 4,
        "CHUNKED": 5,
        "SHARED_INDEX": 6,
        "TREE": 7,
        "POWERSGD": 8,
        "SIGN": 9,
        "TWO_LEVEL": 10,
        "CHOOSING": 11,
        "PUSH": 12,
        "PULL": 13,
        "NATIVE": 14,
    }
