"""Pulls parameters to a worker: sparse or whole from a server that is asked, or read from its window."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.ps.protocol.messages import ENVELOPE_BYTES, READY, WHOLE, Kind
from sparsecomm.ps.worker.client import Client
from sparsecomm.ps.worker.link import Steps
from sparsecomm.ps.worker.metrics import WorkerMetrics
from sparsecomm.ps.worker.part import Part
from sparsecomm.ps.worker.window import read_board
from sparsecomm.transport.mailbox.window import Window
from sparsecomm.types import IndexCodec
from sparsecomm.wire import HEADER_BYTES

__all__ = ["PullCost", "Puller"]

_SMALL, _LARGE = 0, 1 << 18  # bytes of the messages that are timed
_REPEATS = 5
_READ_ROUNDS = 3  # the head, the values, the head again


@dataclass(frozen=True)
class PullCost:
    """Predicted cost of one way to pull. The time that a server takes to select is not in it.

    Attributes:
        way: "sparse", "dense" or "one_sided".
        rounds: Number of exchanges with all servers, one after the other.
        nbytes: Bytes received from all servers.
        seconds: Rounds times the time of an empty round, plus bytes times the time of one more byte.
    """

    way: str
    rounds: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.way:10} {self.rounds} rounds {self.nbytes:12,d} bytes {self.seconds * 1e3:10.3f} ms"


@dataclass(frozen=True)
class _Speed:
    """Measured speed of one way to pull.

    Attributes:
        alpha: Seconds of an empty round with all servers.
        beta: Seconds of one more byte.
    """

    alpha: float
    beta: float


class Puller:
    """Pulls all parts.

    Args:
        client: Sends the requests.
        parts: Parts of the model. Mutated: their versions.
        flat: All parameters, float32. Mutated.
        counted: Counters of this worker. Mutated.

    Attributes:
        way: "sparse", "dense", "one_sided", or "asked" if the servers decide between sparse and dense.
        costs: Predicted cost of each way, cheapest first; empty unless the way was chosen by cost.
    """

    def __init__(self, client: Client, parts: Sequence[Part], flat: torch.Tensor, counted: WorkerMetrics) -> None:
        self.way = "asked"
        self.costs: list[PullCost] = []
        self._client = client
        self._parts = parts
        self._flat = flat
        self._counted = counted
        self._window: Window | None = None

    def begin(self) -> Steps[None]:
        """Opens a window if the link has windows, and chooses a way to pull. Collective if the link has windows."""
        link = self._client.link
        if link.open_window is not None:
            yield from self._ping(READY)
            self._window = link.open_window(0)
        if link.pull_by == "one_sided":
            self.way = "one_sided"
        elif link.pull_by == "auto":
            yield from self._choose()

    def pull(self, clock: int) -> Steps[None]:
        """Brings `flat` up to date once the mode lets a worker that has done `clock` pushes go on."""
        if self.way == "one_sided":
            yield from self._client.wait(Kind.PUSH)  # the values read must include this worker's push
            for part in self._parts:
                yield from self._read(part, clock)
        else:
            for part in self._parts:
                self._ask(part, clock)
        yield from self._client.wait(Kind.PULL)

    def explain(self) -> str:
        """Describes how this worker pulls, and why."""
        lines = [f"pulls: {self.way}", *map(str, self.costs)]
        return "\n".join(lines)

    def _ask(self, part: Part, clock: int) -> None:
        flags = WHOLE if self.way == "dense" else 0
        self._client.ask(Kind.PULL, part.spec.index, clock=clock, version=part.version + 1, flags=flags)

    def _read(self, part: Part, clock: int) -> Steps[None]:
        """Reads a shard from its server's window, or asks for it after too many torn reads."""
        window, spec, link = self._window, part.spec, self._client.link
        assert window is not None
        rank, torn = link.servers[spec.index], [0]
        slowest = None if link.lead is None else clock - link.lead
        out = self._flat[spec.start : spec.end]
        version = yield from read_board(window, rank, out, slowest, f"server rank {rank}", torn)
        self._counted.torn += torn[0]
        if version is None:
            self._counted.fallbacks += 1
            self._ask(part, clock)
        else:
            part.version = version
            link.mailbox.traffic.bytes_received += out.nbytes

    # --- choosing ---

    def _choose(self) -> Steps[None]:
        """Chooses the way with the least predicted cost."""
        asked = yield from self._measure(self._ask_bytes)
        values = 4 * self._flat.numel()
        shards = len(self._parts)
        frame = shards * (ENVELOPE_BYTES + HEADER_BYTES)
        costs = [_cost("dense", asked, 1, values + frame)]
        if self._client.link.sparse is not None:
            costs.append(_cost("sparse", asked, 1, self._sparse_bytes() + frame))
        if self._window is not None:
            read = yield from self._measure(self._read_bytes)
            costs.append(_cost("one_sided", read, _READ_ROUNDS, values))
        self.costs = sorted(costs, key=lambda cost: cost.seconds)
        self.way = self.costs[0].way

    def _sparse_bytes(self) -> int:
        """Returns the expected bytes of a sparse pull from all servers, without envelopes and headers."""
        compressor, codec = self._client.link.sparse, self._client.link.pull_codec
        assert compressor is not None
        total = 0
        for part in self._parts:
            n = part.spec.numel
            k = compressor.k_for(n, 0)
            index = min(kernels.estimate_index_bytes(c, k, n) for c in (IndexCodec.RICE, IndexCodec.BITMAP))
            total += int(index) + kernels.max_value_bytes(codec, k)
        return total

    def _measure(self, move: Callable[[int], Steps[int]]) -> Steps[_Speed]:
        """Times small and large transfers from all servers, the fastest of `_REPEATS` each."""
        best: dict[int, tuple[float, int]] = {}
        for size in (_SMALL, _LARGE):
            for _ in range(_REPEATS):
                began = time.perf_counter()
                moved = yield from move(size)
                best[size] = min(best.get(size, (float("inf"), 0)), (time.perf_counter() - began, moved))
        (small, _), (large, moved) = best[_SMALL], best[_LARGE]
        return _Speed(small, max(0.0, large - small) / max(1, moved))

    def _ask_bytes(self, size: int) -> Steps[int]:
        """Asks all servers for `size` bytes each, at the same time; returns the bytes moved."""
        yield from self._ping(0, size)
        return size * len(self._parts)

    def _read_bytes(self, size: int) -> Steps[int]:
        """Reads `size` bytes from each server's window, or its head if that is longer; returns the bytes moved."""
        moved = 0
        assert self._window is not None
        for part in self._parts:
            out = torch.empty(min(max(size // 4, 6), part.spec.numel), dtype=torch.float32)
            get = self._window.get(self._client.link.servers[part.spec.index], 0, out)
            while not get.test():
                yield "a one-sided read"
            moved += out.nbytes
        return moved

    def _ping(self, flags: int, size: int = 0) -> Steps[None]:
        for part in self._parts:
            self._client.ask(Kind.PING, part.spec.index, clock=size, flags=flags)
        yield from self._client.wait(Kind.PING)


def _cost(way: str, speed: _Speed, rounds: int, nbytes: int) -> PullCost:
    return PullCost(way, rounds, nbytes, rounds * speed.alpha + nbytes * speed.beta)
