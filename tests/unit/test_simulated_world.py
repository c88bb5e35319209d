"""The simulated transport itself: it must count, detect deadlocks, and refuse nonsense."""

from __future__ import annotations

import pytest
import torch

from sparsecomm.errors import CommTimeout, ConfigError, TransportError
from sparsecomm.transport import Channel, CollectiveSteps, SimulatedWorld, SoloTransport
from sparsecomm.transport.base import GroupTransport


def waiting_for(source: int, channel: Channel) -> CollectiveSteps[None]:
    yield [channel.irecv(torch.empty(3, dtype=torch.uint8), source)]


def test_a_receive_that_nobody_sends_to_is_reported_as_a_deadlock() -> None:
    outcomes = SimulatedWorld(2).run(lambda c: waiting_for(1 - c.rank, c), return_exceptions=True)
    assert all(isinstance(o, CommTimeout) for o in outcomes)
    assert "receive of 3 bytes from rank 1" in str(outcomes[0])


def test_errors_are_raised_unless_asked_for() -> None:
    with pytest.raises(CommTimeout, match="simulated rank 0 waits for ever"):
        SimulatedWorld(2).run(lambda c: waiting_for(1 - c.rank, c))


@pytest.mark.parametrize("size", [0, -1])
def test_a_world_needs_a_rank(size: int) -> None:
    with pytest.raises(ConfigError, match=str(size)):
        SimulatedWorld(size)


def test_sends_outside_the_world_and_to_oneself_are_refused() -> None:
    rank = SimulatedWorld(2).ranks[0]
    for dest in (0, 2, -1):
        with pytest.raises(TransportError):
            rank.isend(torch.zeros(1, dtype=torch.uint8), dest, 1)


def test_a_world_of_one_has_nobody_to_talk_to() -> None:
    solo = SoloTransport()
    with pytest.raises(TransportError, match="no rank 1"):
        solo.isend(torch.zeros(1, dtype=torch.uint8), 1, 0)
    with pytest.raises(TransportError, match="no rank 1"):
        solo.irecv(torch.zeros(1, dtype=torch.uint8), 1, 0)
    solo.close()
    solo.abort(1)


def test_a_group_translates_ranks() -> None:
    world = SimulatedWorld(4)
    sender, receiver = GroupTransport(world.ranks[3], [1, 3]), GroupTransport(world.ranks[1], [1, 3])
    assert (sender.rank, sender.size, receiver.rank) == (1, 2, 0)
    sender.isend(torch.tensor([7], dtype=torch.uint8), 0, 5)
    buffer = torch.empty(1, dtype=torch.uint8)
    assert receiver.irecv(buffer, 1, 5).test()
    assert buffer.item() == 7


@pytest.mark.parametrize("ranks", [[0, 1], [2, 2], [2, 4], [2, -1], []])
def test_a_group_needs_its_own_rank_and_distinct_ranks_of_the_world(ranks: list[int]) -> None:
    with pytest.raises(TransportError, match="rank 2 of 4"):
        GroupTransport(SimulatedWorld(4).ranks[2], ranks)
