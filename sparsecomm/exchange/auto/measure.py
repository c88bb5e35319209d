"""The costs of messages and kernels, measured by all ranks together in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter

import torch

from sparsecomm import kernels
from sparsecomm.collectives import agreed_maximum, link_between_hosts, measure_link, rings
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

__all__ = ["agree_to_choose", "measure"]

_ELEMENTS = 1 << 20
_REPEATS = 5
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
    around, inside = rings(channel.nodes)
    link = yield from link_between_hosts(channel)
    if link is None:
        link = yield from measure_link(channel, around)
    inner = yield from measure_link(channel, inside[channel.nodes[channel.rank]])
    selector = TopK() if compressor.collectives or compressor.is_dense else compressor
    mine = torch.tensor([_exchange_seconds(arena), *_kernel_seconds(selector, density)], dtype=torch.float64)
    figures = yield from agreed_maximum(channel, mine, arena)
    beside = max(len(ranks) for ranks in inside.values())
    return Costs(
        link.alpha,
        link.beta,
        *figures,
        nodes=len(inside),
        beside=beside,
        inner_alpha=inner.alpha,
        inner_beta=inner.beta,
    )


def agree_to_choose(channel: Channel, step: int, arena: Arena) -> CollectiveSteps[None]:
    """Checks that all ranks choose a method in this step. Collective.

    Raises:
        AgreedError: raised on every rank if some rank does not.
    """
    header = blank_header(channel.rank, channel.size, 0, step, 0, _CHOOSING.number)
    payload = arena.get((_KEY, "payload"), HEADER_BYTES, torch.uint8)
    write_header(header, payload)
    yield from agree(channel, header, payload, arena, _KEY)


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
