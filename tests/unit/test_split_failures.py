"""Split-reduce with a failure at every message: an error names the rank, and nothing is half-applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import Cluster, Raising, assert_conserved, assert_restored, gradient, plan, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomm.errors import CollectiveMismatch, CommTimeout, RemoteError, TransportError, WireError
from sparsecomm.exchange import blank_header, exchange
from sparsecomm.exchange.agree import DIGEST_ABOVE, DIGEST_BYTES, Agreement, agree
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import MomentumCorrection
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, SimulatedWorld
from sparsecomm.types import ValueCodec
from sparsecomm.wire import FLAG_NONFINITE, HEADER_BYTES, write_header

N = 120
SPLITS = ("split_reduce", "ssar")
LARGE = DIGEST_ABOVE + 1


class Scene:
    """A cluster after some steps, and copies of its state before the next one."""

    def __init__(self, size: int, collective: str, *, warm: int = 1, momentum: bool = False) -> None:
        self.cluster = Cluster(size, N, bucket=4)
        self.feedback = {"feedback": MomentumCorrection(0.9)} if momentum else {}
        for bucket in self.cluster.buckets if momentum else ():
            bucket.velocity = torch.zeros(N, dtype=torch.float32)
        self.collective = collective
        for step in range(warm):
            self.cluster.step([self.grad(step, r) for r in range(size)], self.plan(step))
        self.step = warm
        self.before = [r.clone() for r in self.cluster.residuals]
        self.velocities = [b.velocity.clone() for b in self.cluster.buckets if b.velocity is not None]
        self.shared = [b.shared for b in self.cluster.buckets]
        self.sent = [self.grad(warm, r) for r in range(size)]
        self.grads = [g.clone() for g in self.sent]

    @staticmethod
    def grad(step: int, rank: int) -> torch.Tensor:
        return gradient("normal", N, torch.float32, 100 * step + rank)

    def plan(self, step: int):  # type: ignore[no-untyped-def]
        return plan(N, step=step, collective=self.collective, value_codec=ValueCodec.FP16, **self.feedback)

    def run(self) -> list[object]:
        return self.cluster.exchange(self.grads, self.plan(self.step))

    def assert_untouched(self, rank: int) -> None:
        assert same_bits(self.grads[rank], self.sent[rank]), f"the bucket of rank {rank} was touched"
        if self.velocities:
            residual, velocity = self.cluster.residuals[rank], self.cluster.buckets[rank].velocity
            torch.testing.assert_close(residual, self.before[rank], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(velocity, self.velocities[rank], rtol=1e-4, atol=1e-5)
        else:
            assert_restored([self.cluster.residuals[rank]], [self.before[rank]], [self.sent[rank]])
        assert self.cluster.buckets[rank].shared is self.shared[rank]

    def assert_whole_or_untouched(self, outcomes: list[object]) -> None:
        """Failed ranks have their old state, and all others have the same complete result."""
        good = [r for r, o in enumerate(outcomes) if not isinstance(o, BaseException)]
        for rank in range(self.cluster.size):
            if rank not in good:
                self.assert_untouched(rank)
        assert all(same_bits(self.grads[good[0]], self.grads[r]) for r in good[1:])


Change = Callable[[torch.Tensor], torch.Tensor | None]


def tamper_with(scene: Scene, nth: int, change: Change, source: int = 1, dest: int = 0) -> list[int]:
    """Changes the n-th message from `source` to `dest`. Returns a list that receives the lengths of these messages."""
    seen: list[int] = []

    def tamper(s: int, d: int, message: torch.Tensor) -> torch.Tensor | None:
        if (s, d) != (source, dest):
            return message
        seen.append(message.numel())
        return change(message) if len(seen) == nth + 1 else message

    scene.cluster.world.tamper = tamper
    return seen


def flip(position: float) -> Change:
    def change(message: torch.Tensor) -> torch.Tensor:
        message[int(position * (message.numel() - 1))] ^= 64
        return message

    return change


MOST = 12
"""More messages than one rank sends to another in a step of these worlds."""


@pytest.mark.parametrize("collective", SPLITS)
@pytest.mark.parametrize(("size", "warm"), [(2, 0), (2, 1), (3, 0), (3, 1)])
@pytest.mark.parametrize("damage", ["lost", "flipped first", "flipped middle", "flipped last", "cut"])
def test_any_damaged_message_is_an_error_that_names_its_sender(
    size: int, warm: int, damage: str, collective: str
) -> None:
    """Damages every message between two ranks in turn, with and without regions from the last step."""
    damage_each_message(size, warm, damage, collective)


@pytest.mark.parametrize("damage", ["lost", "flipped middle"])
def test_so_it_is_where_digests_go_ahead(damage: str) -> None:
    damage_each_message(LARGE, 1, damage, "split_reduce")


def damage_each_message(size: int, warm: int, damage: str, collective: str) -> None:
    changes: dict[str, Change] = {
        "lost": lambda message: None,
        "flipped first": flip(0.0),
        "flipped middle": flip(0.5),
        "flipped last": flip(1.0),
        "cut": lambda message: message[:-1].clone(),
    }
    hit = 0
    for nth in range(MOST):
        scene = Scene(size, collective, warm=warm)
        seen = tamper_with(scene, nth, changes[damage])
        outcomes = scene.run()
        if len(seen) <= nth:
            assert not any(isinstance(o, BaseException) for o in outcomes)
            break
        hit += 1
        first = outcomes[0]
        if damage in ("lost", "cut"):
            # The receiver takes a later message instead, often of another length, or waits in vain.
            assert isinstance(first, (CommTimeout, TransportError, WireError))
        else:
            # The error names the author, which may differ from rank 1 if rank 1 only forwards the message.
            assert isinstance(first, WireError), f"message {nth}: {first!r}"
            assert first.bucket == 4
            assert first.rank is not None
            assert first.rank != 0
        for other in outcomes[1:]:
            assert not isinstance(other, BaseException) or isinstance(other, (CommTimeout, WireError, TransportError))
        scene.assert_whole_or_untouched(outcomes)
    assert hit >= 4
    assert hit < MOST


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("collective", SPLITS)
@pytest.mark.parametrize("size", [2, 3, LARGE])
def test_a_rank_that_fails_before_the_exchange_is_named_everywhere(size: int, collective: str, momentum: bool) -> None:
    scene = Scene(size, collective, momentum=momentum)
    plans = [scene.plan(1)] * size
    plans[1] = replace(plans[1], compressor=Raising("out of cheese"))
    outcomes = scene.cluster.exchange(scene.grads, plans)
    assert isinstance(outcomes[1], ValueError)
    for rank in set(range(size)) - {1}:
        assert isinstance(outcomes[rank], RemoteError)
        assert "rank 1 failed in bucket 4 of step 1: ValueError: out of cheese" in str(outcomes[rank])
    for rank in range(size):
        scene.assert_untouched(rank)
    again = [scene.grad(1, r) for r in range(size)]
    before = [r.clone() for r in scene.cluster.residuals]
    scene.cluster.step(again, scene.plan(1))
    if not momentum:
        assert_conserved(scene.sent, before, again[0], scene.cluster.residuals)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("collective", SPLITS)
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_rank_that_breaks_half_way_leaves_all_as_they_were(collective: str, turn: int, momentum: bool) -> None:
    """The generator of one rank is closed, as the engine does after a failure; the others wait in vain."""
    scene = Scene(3, collective, momentum=momentum)
    plans = scene.plan(1)

    def make(channel: Channel) -> CollectiveSteps[object]:
        r = channel.rank
        steps = exchange(channel, scene.cluster.buckets[r], scene.grads[r], plans, scene.cluster.arenas[r])
        return breaking(steps) if r == 1 else steps

    def breaking(steps: CollectiveSteps[object]) -> CollectiveSteps[object]:
        for done, requests in enumerate(steps):
            if done == turn:
                steps.close()
                raise ConnectionError("pulled the plug")
            yield requests

    outcomes = scene.cluster.world.run(make, return_exceptions=True)
    if isinstance(outcomes[1], ConnectionError):
        assert any(isinstance(o, CommTimeout) for o in (outcomes[0], outcomes[2])) or turn > 3
        scene.assert_whole_or_untouched(outcomes)
    else:
        assert turn > 5, "it was done before"


@pytest.mark.parametrize("collective", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 3, LARGE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_anywhere_skips_the_step_everywhere(size: int, bad: float, collective: str) -> None:
    scene = Scene(size, collective)
    scene.grads[size - 1][7] = bad
    reports = scene.run()
    assert all(bool(g.isnan().all()) for g in scene.grads)
    assert [r.skipped for r in reports] == [1] * size
    sent = [torch.where(g.isnan(), s, s) for g, s in zip(scene.grads, scene.sent, strict=True)]
    assert_restored(scene.cluster.residuals, scene.before, sent)
    made = {b.shared.made for b in scene.cluster.buckets}
    scene.cluster.step([scene.grad(2, r) for r in range(size)], scene.plan(2))
    assert {b.shared.made for b in scene.cluster.buckets} == made, "the regions are still good"


@pytest.mark.parametrize("collective", SPLITS)
@pytest.mark.parametrize("size", [2, 5])
def test_a_sum_that_overflows_skips_the_step_everywhere(size: int, collective: str) -> None:
    """All gradients are finite, but not their sum; at first only the owner of the region sees that."""
    scene = Scene(size, collective)
    how = replace(scene.plan(1), value_codec=ValueCodec.FP32)
    for g in scene.grads:
        g[3] = 3e38
    scene.sent = [g.clone() for g in scene.grads]
    reports = scene.cluster.exchange(scene.grads, how)
    assert [r.skipped for r in reports] == [1] * size
    assert all(bool(g.isnan().all()) for g in scene.grads)
    assert_restored(scene.cluster.residuals, scene.before, scene.sent)


@pytest.mark.parametrize("collective", SPLITS)
def test_an_average_out_of_the_range_of_halves_skips_the_step_everywhere(collective: str) -> None:
    scene = Scene(3, collective)
    grads = [torch.full((N,), 60000.0, dtype=torch.float16) for _ in range(3)]
    for r in scene.cluster.residuals:
        r.fill_(60000.0)
    reports = scene.cluster.exchange(grads, scene.plan(1))
    assert [r.skipped for r in reports] == [1] * 3
    for r in scene.cluster.residuals:
        torch.testing.assert_close(r, torch.full((N,), 60000.0, dtype=torch.float32))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("collective", SPLITS)
@pytest.mark.parametrize("momentum", [False, True])
def test_a_step_that_the_optimizer_skips_is_taken_back_whole(skipped: bool, collective: str, momentum: bool) -> None:
    """The residuals already hold the dropped sums and the rounding, which must be removed as well."""
    scene = Scene(3, collective, momentum=momentum)
    cluster, how = scene.cluster, replace(scene.plan(1), final=False)
    cluster.world.run(lambda c: exchange(c, cluster.buckets[c.rank], scene.grads[c.rank], how, cluster.arenas[c.rank]))
    applied = scene.grads[0].clone()
    for bucket in cluster.buckets:
        bucket.finish_step(skipped=skipped)
    if skipped:
        assert all(same_bits(a, b) for a, b in zip(cluster.residuals, scene.before, strict=True))
    elif not momentum:
        assert_conserved(scene.sent, scene.before, applied, cluster.residuals)


# --- the agreement ------------------------------------------------------------------------------------------------


@given(
    size=st.integers(2, 40),
    rank=st.integers(0, 39),
    change=st.sampled_from(["", "tag", "no tag", "step", "nonfinite", "collective", "k"]),
)
@settings(max_examples=40)
def test_one_rank_that_differs_is_found_out_by_all(size: int, rank: int, change: str) -> None:
    def make(channel: Channel) -> CollectiveSteps[Agreement]:
        odd = channel.rank == rank % size
        header = blank_header(channel.rank, size, 3, 8, 1000, method_named("split_reduce").number)
        header.nnz, header.tag = 10, 77
        if odd and change == "tag":
            header.tag = 78
        if odd and change == "no tag":
            header.tag = 0
        if odd and change == "step":
            header.step = 9
        if odd and change == "k":
            header.nnz = 11
        if odd and change == "collective":
            header.collective = method_named("ssar").number
        if odd and change == "nonfinite":
            header.flags = FLAG_NONFINITE
        payload = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        write_header(header, payload)
        return agree(channel, header, payload, Arena(), 0, gather=False)

    world = SimulatedWorld(size)
    for outcome in world.run(make, return_exceptions=True):
        if change in ("step", "collective", "k"):
            assert isinstance(outcome.cause, CollectiveMismatch)
            assert f"rank {rank % size}: " in str(outcome)
            assert change in str(outcome)
        else:
            assert outcome.nonfinite == (change == "nonfinite")
            assert outcome.same_tag == (change in ("", "nonfinite"))
    if size > DIGEST_ABOVE and change in ("", "tag", "no tag", "nonfinite"):
        for traffic in world.traffic:
            assert traffic.bytes_sent == DIGEST_BYTES * (size - 1).bit_length()
            assert traffic.messages_sent == (size - 1).bit_length()


@pytest.mark.parametrize("position", [0, 4, 5, 6, 8, 16, 20, 23])
def test_a_damaged_digest_names_its_sender(position: int) -> None:
    scene = Scene(LARGE, "split_reduce")
    tamper_with(scene, 0, flip(position / (DIGEST_BYTES - 1)), source=0, dest=1)
    outcomes = scene.run()
    assert isinstance(outcomes[1], WireError)
    assert (outcomes[1].rank, outcomes[1].bucket) == (0, 4)
    scene.assert_whole_or_untouched(outcomes)
