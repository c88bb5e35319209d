"""`bench volume`: bytes that exchanges send among simulated ranks, which encode, send and decode real messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from typing_extensions import override

from sparsecomm.collectives import dense_ring_bytes
from sparsecomm.compress import Compressor, Selection, SelectionBuffers
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.errors import ConfigError
from sparsecomm.exchange import Plan, exchange
from sparsecomm.exchange.method import Scope, method_named
from sparsecomm.feedback import BucketLayout, BucketMemory
from sparsecomm.runtime.arena import Arena
from sparsecomm.tools.benches import bench, meta, table, verdict
from sparsecomm.tools.benches.compressors import compressor_for
from sparsecomm.transport import Channel, CollectiveSteps, SimulatedWorld
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["KINDS", "print_table", "run"]

_LIFETIME = 64  # steps that one partition serves, over which the extra cost of the step that makes it is spread


@bench("volume", keys=("collective", "ranks", "density", "kind"), measures=("words", "balance"))
def run(
    ranks: Sequence[int] = (2, 3, 4, 6, 8, 12, 16, 64),
    densities: Sequence[float] = (0.001, 0.01),
    kinds: Sequence[str] = ("random", "clustered", "adversarial"),
    collectives: Sequence[str] = ("split_reduce",),
    steps: int = 4,
    k: int = 4096,
    value_codec: str = "fp16",
) -> dict[str, Any]:
    """Counts the bytes of exchanges among simulated ranks, including headers.

    The unit is k (P - 1) / P words of 4 bytes, the least that any sparse allreduce sends before coding. Goals: at most
    3 units, and at most 1.2 times the mean traffic on the busiest rank.

    Args:
        ranks: World sizes.
        densities: Nonzeros per rank (k) over the elements of the bucket.
        kinds: Positions of the large elements: random, clustered (each rank elsewhere) or adversarial (all ranks in one
            place).
        collectives: Collectives to measure.
        steps: Steps to measure after the first, in which ranks partition the index space.
        k: Nonzeros per rank; raised to 16 P in larger worlds, where headers would dominate. Where all ranks select the
            same positions, the compressor derives k from the density.
        value_codec: Codec of the values.

    Returns:
        ``{"meta": {...}, "rows": [...]}``. A row has collective, ranks, density, numel, k, kind, bytes (of the rank
        that sends or receives most, in the worst step after the first), words (bytes in units), words_first (those of
        the first step), words_mean (mean of a first step and 63 others), balance (busiest rank over mean), kept
        (nonzeros of the result), overlap (fraction of the exact top k of the sum that is in the result), dense_ratio
        (bytes over those of a dense float32 ring), estimate_ratio (predicted bytes over bytes), goal and ok.

    Raises:
        ConfigError: A kind, collective or codec is unknown, or a number is too small.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kind = {kind!r} does not exist; known are {', '.join(KINDS)}")
    codecs = {c.name.lower(): c for c in ValueCodec}
    if value_codec not in codecs:
        raise ConfigError(f"value_codec = {value_codec!r} does not exist; known are {', '.join(codecs)}")
    if steps < 1 or k < 1 or any(p < 2 for p in ranks) or any(not 0 < d <= 1 for d in densities):
        given = f"steps = {steps}, k = {k}, ranks = {tuple(ranks)}, densities = {tuple(densities)}"
        raise ConfigError(f"need steps and k >= 1, ranks >= 2, densities in (0, 1], got {given}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        info = meta()
        for name in collectives:
            for size in ranks:
                for density in densities:
                    for kind in kinds:
                        many = max(k, 16 * size)
                        numel = round(many / density)
                        cell = _Cell(name, size, numel, density, many, kind, codecs[value_codec])
                        rows.append(cell.measure(steps))
    finally:
        torch.set_num_threads(threads)
    return {"meta": info, "rows": rows}


def _random(rank: int, size: int, numel: int, k: int, g: torch.Generator) -> torch.Tensor:
    return _some(0, numel, k, g)


def _clustered(rank: int, size: int, numel: int, k: int, g: torch.Generator) -> torch.Tensor:
    width = min(numel, max(2 * k, numel // size))
    place = (rank * 7919) % size  # the regions of consecutive ranks are not adjacent
    return _some(place * (numel - width) // max(1, size - 1), width, k, g)


def _adversarial(rank: int, size: int, numel: int, k: int, g: torch.Generator) -> torch.Tensor:
    width = min(numel, 2 * k)
    return _some((numel - width) // 3, width, k, g)


KINDS: dict[str, Callable[[int, int, int, int, torch.Generator], torch.Tensor]] = {
    "random": _random,
    "clustered": _clustered,
    "adversarial": _adversarial,
}
"""Functions that return the positions of a rank's k largest elements, by kind of gradient."""


def _some(start: int, width: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Returns k distinct positions in [start, start + width), ascending, int64."""
    if 4 * k > width:
        return start + torch.randperm(width, generator=g)[:k].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < k:
        more = torch.randint(width, (k + k // 8 + 16,), generator=g)
        found = torch.from_numpy(np.union1d(found.numpy(), more.numpy()))
    drop = torch.randperm(found.numel(), generator=g)[:k].sort().values
    return start + found[drop]


class _Given(Compressor):
    """Returns a given selection. The volume depends on nothing else, so ranks need no gradients of their own."""

    def __init__(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        self._indices, self._values = indices, values

    @override
    def density_at(self, step: int) -> float:
        return 1.0  # not used, since the plan holds k

    @override
    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        """Writes the given selection; neither reads nor writes gradient and residual."""
        nnz = self._values.numel()
        out.indices[:nnz] = self._indices
        out.values[:nnz] = self._values
        return Selection(nnz, 0)


@dataclass
class _Cell:
    """A combination of collective, world size, bucket size and kind of gradient."""

    name: str
    size: int
    numel: int
    density: float
    wanted: int
    kind: str
    codec: ValueCodec

    def __post_init__(self) -> None:
        own = method_named(self.name).scope == Scope.OWN
        self.compressor = compressor_for(self.name, self.density) if own else None
        # These send data made from the whole gradient, so the gradient must hold the selection and nothing else.
        self.made_of_all = own or self.name == "two_level"
        self.k = self.wanted if self.compressor is None else self.compressor.k_for(self.numel, 0)

    def measure(self, steps: int) -> dict[str, Any]:
        """Runs a first step and `steps` others, and returns the row."""
        # Each rank is on a separate host, as the estimates assume.
        world = SimulatedWorld(self.size, range(self.size))
        rows = max(r for r in range(1, math.isqrt(self.numel) + 1) if self.numel % r == 0)
        layout = BucketLayout(("weight",), ((rows, self.numel // rows),), ((self.numel // rows, 1),))
        # All ranks write the same average, and with a given selection none reads gradient or residual. One gradient and
        # one residual then serve all ranks, which saves memory.
        alone = self.size if self.made_of_all else 1
        grads = [torch.zeros(self.numel, dtype=torch.float32) for _ in range(alone)] * (self.size // alone)
        residuals = [torch.zeros(self.numel, dtype=torch.float32) for _ in range(alone)] * (self.size // alone)
        buckets = [BucketMemory(0, layout, residual) for residual in residuals]
        arenas = [Arena() for _ in range(self.size)]
        worst, first, balance, kept, overlap = 0, 0, 1.0, 0.0, 0.0
        for step in range(steps + 1):
            selections = [self._selection(rank, step) for rank in range(self.size)]
            plans = [self._plan(step, *own) for own in zip(grads, residuals, selections, strict=True)]
            before = [(t.bytes_sent, t.bytes_received) for t in world.traffic]

            def make(channel: Channel, plans: list[Plan] = plans) -> CollectiveSteps[object]:
                r = channel.rank
                return exchange(channel, buckets[r], grads[r], plans[r], arenas[r])

            world.run(make)
            moved = [
                (t.bytes_sent - sent, t.bytes_received - received)
                for t, (sent, received) in zip(world.traffic, before, strict=True)
            ]
            most = max(max(m) for m in moved)
            if step == 0:
                first = most
                continue
            worst = max(worst, most)
            balance = max(balance, max(map(sum, moved)) * self.size / sum(map(sum, moved)))
            kept += int(torch.count_nonzero(grads[0])) / steps
            overlap += self._overlap(grads[0], selections) / steps
        unit = 4 * self.k * (self.size - 1) / self.size
        words = worst / unit
        estimate = method_named(self.name).bytes_sent(Sizes(self.k, self.numel, self.size, self.codec))
        return {
            "collective": self.name,
            "ranks": self.size,
            "density": self.density,
            "numel": self.numel,
            "k": self.k,
            "kind": self.kind,
            "bytes": worst,
            "words": words,
            "words_first": first / unit,
            "words_mean": (first / unit + (_LIFETIME - 1) * words) / _LIFETIME,
            "balance": balance,
            "kept": kept,
            "overlap": overlap,
            "dense_ratio": worst / dense_ring_bytes(self.numel, self.size),
            "estimate_ratio": estimate / max(worst, 1),
            "goal": 3.0,
            "ok": "MISS" if balance > 1.2 else verdict(words, 3.0),
        }

    def _plan(
        self, step: int, grad: torch.Tensor, residual: torch.Tensor, selection: tuple[torch.Tensor, torch.Tensor]
    ) -> Plan:
        """Returns the plan for a rank's selection; where `made_of_all`, writes the selection to the gradient."""
        if self.made_of_all:
            residual.zero_()
            grad.zero_()[selection[0].to(torch.int64)] = selection[1]
        compressor = _Given(*selection) if self.compressor is None else self.compressor
        return Plan(step, self.name, compressor, self.k, value_codec=self.codec)

    def _selection(self, rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a rank's selection: k positions of its kind, with values from the tails of a Laplacian."""
        g = torch.Generator().manual_seed(100_003 * step + rank)
        indices = KINDS[self.kind](rank, self.size, self.numel, self.wanted, g)
        magnitudes = 1.0 + torch.empty(self.wanted, dtype=torch.float32).exponential_(4.0, generator=g)
        signs = torch.randint(2, (self.wanted,), generator=g) * 2.0 - 1.0
        return indices.to(torch.uint32), magnitudes * signs

    def _overlap(self, result: torch.Tensor, selections: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Returns the fraction of the exact top k of the sum of all selections that is in the result."""
        total = torch.zeros(self.numel, dtype=torch.float64)
        for indices, values in selections:
            total.index_add_(0, indices.to(torch.int64), values.double())
        best = total.abs().topk(self.wanted).indices
        return int(torch.count_nonzero(result[best])) / self.wanted


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of `run`."""
    columns = {
        "collective": ("collective", ""),
        "P": ("ranks", "d"),
        "density": ("density", "g"),
        "k": ("k", ",d"),
        "gradients": ("kind", ""),
        "bytes": ("bytes", ",d"),
        "words": ("words", ".3f"),
        "first step": ("words_first", ".3f"),
        "mean": ("words_mean", ".3f"),
        "balance": ("balance", ".3f"),
        "kept": ("kept", ".0f"),
        "overlap": ("overlap", ".3f"),
        "/ dense": ("dense_ratio", ".4f"),
        "estimated": ("estimate_ratio", ".2f"),
        "goal": ("goal", "g"),
        "verdict": ("ok", ""),
    }
    title = "bytes per rank, in k (P - 1) / P words of 4 bytes, including headers (goal of balance: 1.2)"
    (console or Console()).print(table(title, result["rows"], columns))
