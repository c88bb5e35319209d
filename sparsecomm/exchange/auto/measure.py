"""The costs of messages and kernels, measured by all ranks together in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter

import torch

from sparsecomm import kernels
from sparsecomm.collectives import allgather
from sparsecomm.compress import Compressor, SelectionBuffers, TopK
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.exchange.agree import agree
from sparsecomm.exchange.costs import Costs
from sparsecomm.exchange.method import blank_header, method_named
from sparsecomm.exchange.pipeline import exchange
from sparsecomm.exchange.plan import Plan
from sparsecomm.feedback import BucketLayout, BucketMemory
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, SoloTransport
from sparsecomm.types import ValueCodec
from sparsecomm.wire import (
    HEADER_BYTES,
    HeaderRules,
    check_pairs,
    choose_index_codec,
    decode_body,
    encode_payload,
    max_payload_bytes,
    register_rules,
    write_header,
)

__all__ = ["agree_to_choose", "agreed_maximum", "measure"]

_ELEMENTS = 1 << 20
_REPEATS = 5
_SMALL, _MEDIUM, _LARGE = 64, 1 << 16, 1 << 19  # bytes; at 100 Mbit/s all messages together take 0.3 s
_KEY = "choose"

_CHOOSING = HeaderRules(11, "CHOOSING", check_pairs)
"""Rules for the headers of ranks that choose a method. No bucket is exchanged, and no body follows."""
register_rules(_CHOOSING)


def measure(
    channel: Channel, step: int, compressor: Compressor, density: float, arena: Arena
) -> CollectiveSteps[Costs]:
    """Measures messages and kernels while all ranks use them at once. Collective.

    Args:
        channel: connection to the other ranks.
        step: training step, which must be the same on all ranks.
        compressor: compressor whose selection is timed.
        density: fraction of elements that is selected.
        arena: allocates the buffers.

    Returns:
        For each cost the figure of the slowest rank; the same on all ranks.

    Raises:
        AgreedError: some rank is in another step or does not measure.
    """
    yield from agree_to_choose(channel, step, arena)
    around, inside = _rings(channel.nodes)
    alpha, beta = yield from _measure_link(channel, around, arena)
    inner = yield from _measure_link(channel, inside[channel.nodes[channel.rank]], arena)
    selector = TopK() if compressor.collectives or compressor.is_dense else compressor
    mine = torch.tensor(
        [alpha, beta, _exchange_seconds(arena), *_kernel_seconds(selector, density), *inner], dtype=torch.float64
    )
    *figures, inner_alpha, inner_beta = yield from agreed_maximum(channel, mine, arena)
    beside = max(len(ranks) for ranks in inside.values())
    return Costs(*figures, nodes=len(inside), beside=beside, inner_alpha=inner_alpha, inner_beta=inner_beta)


def agree_to_choose(channel: Channel, step: int, arena: Arena) -> CollectiveSteps[None]:
    """Checks that all ranks choose a method in this step. Collective.

    Raises:
        AgreedError: raised on every rank if some rank does not.
    """
    header = blank_header(channel.rank, channel.size, 0, step, 0, _CHOOSING.number)
    payload = arena.get((_KEY, "payload"), HEADER_BYTES, torch.uint8)
    write_header(header, payload)
    yield from agree(channel, header, payload, arena, _KEY)


def agreed_maximum(channel: Channel, mine: torch.Tensor, arena: Arena) -> CollectiveSteps[list[float]]:
    """Returns the elementwise maximum of the float64 vectors of all ranks, the same on all ranks. Collective."""
    blocks = [mine.view(torch.uint8)]
    if channel.size > 1:
        blocks = yield from allgather(channel, blocks[0], arena, (_KEY, "figures"))
    figures: list[float] = torch.stack([b.clone().view(torch.float64) for b in blocks]).amax(0).tolist()
    return figures


def _rings(nodes: Sequence[int]) -> tuple[list[int], dict[int, list[int]]]:
    """Returns a ring of all ranks whose neighbours are on different nodes if possible, and the ranks of each node.

    In this ring all ranks of a node use its link at once, as in an exchange between all ranks.
    """
    inside: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        inside.setdefault(node, []).append(rank)
    place = {rank: (i, ranks[0]) for ranks in inside.values() for i, rank in enumerate(ranks)}
    return sorted(place, key=lambda rank: place[rank]), inside


def _measure_link(channel: Channel, ring: Sequence[int], arena: Arena) -> CollectiveSteps[tuple[float, float]]:
    """Returns seconds per round and per byte while every rank of a ring sends to the next one. Collective."""
    if len(ring) == 1:
        return 0.0, 0.0
    place = ring.index(channel.rank)
    before, after = ring[place - 1], ring[(place + 1) % len(ring)]
    out = arena.get((_KEY, "out"), _LARGE, torch.uint8)
    into = arena.get((_KEY, "into"), _LARGE, torch.uint8)
    times = {}
    for length, repeats in ((_SMALL, 24), (_MEDIUM, 6), (_LARGE, 4)):
        samples = []
        for _ in range(repeats):
            start = perf_counter()
            yield [
                channel.irecv(into[:length], before),
                channel.isend(out[:length], after),
            ]
            samples.append(perf_counter() - start)
        times[length] = median(samples[1:])
    beta = max(times[_LARGE] - times[_MEDIUM], times[_LARGE] / 8) / (_LARGE - _MEDIUM)
    return times[_SMALL], beta


def _best(task: Callable[[], object], repeats: int = _REPEATS) -> float:
    task()
    return min(_timed(task) for _ in range(repeats))


def _timed(task: Callable[[], object]) -> float:
    start = perf_counter()
    task()
    return perf_counter() - start


def _exchange_seconds(arena: Arena) -> float:
    """Returns the seconds of an exchange of 64 elements in a world of one rank."""
    layout = BucketLayout(("gradient",), ((64,),), ((1,),))
    bucket, grad = BucketMemory(0, layout, torch.zeros(64, dtype=torch.float32)), torch.ones(64, dtype=torch.float32)
    plan = Plan(0, "allgather", TopK(), 1, ValueCodec.FP16)

    def alone() -> None:
        for _ in exchange(Channel(SoloTransport(), 0), bucket, grad, plan, arena):
            pass

    return _best(alone, 20)


def _kernel_seconds(compressor: Compressor, density: float) -> Iterator[float]:
    """Yields the costs from `select` to `add`, in the order of `Costs`."""
    n = _ELEMENTS
    k = max(1, min(n, round(density * n)))
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    residual, memory = torch.zeros(n, dtype=torch.float32), SelectorMemory()
    capacity = compressor.capacity(k, n)
    out = SelectionBuffers(torch.empty(capacity, dtype=torch.uint32), torch.empty(capacity, dtype=torch.float32))
    yield _best(lambda: compressor.select(grad, residual, k, memory, out)) / n
    empty = _best(lambda: kernels.scatter_reduce(grad, [], scale=1.0))
    yield empty / n
    indices = torch.arange(0, n, max(1, n // k), dtype=torch.int64)[:k].to(torch.uint32)
    values, error = torch.ones(k, dtype=torch.float32), torch.empty(k, dtype=torch.float32)
    header = blank_header(0, 1, 0, 0, n, method_named("allgather").number)
    header.value_codec, header.index_codec = ValueCodec.FP16, choose_index_codec(k, n)
    payload = torch.empty(max_payload_bytes(header.index_codec, header.value_codec, k, n), dtype=torch.uint8)
    yield _best(lambda: encode_payload(header, indices, values, payload, error)) / k
    body = payload[HEADER_BYTES : HEADER_BYTES + header.body_bytes]

    def decode() -> None:
        decode_body(header, body, indices, values)
        kernels.scatter_reduce(grad, [(indices, values)], scale=1.0)

    yield max(_best(decode) - empty, 0.0) / k
    yield _best(lambda: kernels.add_dense(residual, grad)) / n
