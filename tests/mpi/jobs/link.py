"""Starts dense sums in groups of ranks that reach them in another order on every rank, and compares their links."""

from __future__ import annotations

import queue
import time
from typing import Any

import torch
import torch.distributed as dist

import sparsecomm as sc
from sparsecomm.collectives import DenseSum, choose_dense, dense_allreduce, link
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Link, Task
from sparsecomm.types import ValueCodec

SIZES = [1 << b for b in range(12, 22)]
measured = 0
real = link.measure_link


def counting(channel: Channel, ring: list[int]) -> CollectiveSteps[Link]:
    """Counts the measurements of this rank."""
    global measured
    measured += 1
    return real(channel, ring)


def summing(numel: int, pauses: int) -> Any:
    """A dense sum after some turns of the engine. Its result is the link."""

    def steps(channel: Channel) -> CollectiveSteps[Link | None]:
        until = time.monotonic() + 0.02 * pauses
        while time.monotonic() < until:
            yield []
        work = torch.full((numel,), float(channel.rank + 1), dtype=torch.float32)
        yield from dense_allreduce(channel, DenseSum(work), Arena(), 0)
        assert bool((work == channel.size * (channel.size + 1) / 2).all())
        return channel.link.known if channel.link is not None else None

    return steps


def links_of(world: sc.World, group: tuple[int, ...] | None) -> list[Any]:
    """Returns what each of several sums in flight found."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for i, numel in enumerate(SIZES):
        make = summing(numel, (i - world.rank) % len(SIZES))
        world.engine.submit(Task(f"sum {i}", make, done.put, done.put, group=group))
    return [done.get(timeout=120) for _ in SIZES]


def choices(known: Link | None, size: int) -> list[str]:
    """Returns the algorithm of every sum."""
    return [choose_dense(n, size, ValueCodec.FP32, one_host=False, link=known).name for n in SIZES]


def main() -> None:
    """Sums among all ranks and among all but the first."""
    link.measure_link = counting
    world = sc.init()
    others = tuple(range(1, world.size))
    expected = 0
    for group in (None, others):
        ranks = range(world.size) if group is None else group
        mine = links_of(world, group) if world.rank in ranks else []
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, [(repr(known), choices(known, len(ranks))) for known in mine])
        found = [outcome for rank in everyone for outcome in rank]
        assert len(found) == len(ranks) * len(SIZES)
        assert all(outcome == found[0] for outcome in found), found
        between_hosts = len({world.nodes[r] for r in ranks}) > 1
        assert (found[0][0] != "None") == between_hosts
        expected += between_hosts and world.rank in ranks
        assert measured == expected, f"measured {measured} times in place of {expected}"
    world.barrier()
    if world.rank == 0:
        print(f"{world.size} ranks have measured alike")


if __name__ == "__main__":
    main()
