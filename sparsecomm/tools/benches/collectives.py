"""`bench collectives`: averages gradients with our algorithms and those of Gloo and MPI, on the same ranks in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import Timing, alternate, bench, figures, meta, slowest, table, timing, verdict
from sparsecomm.tools.benches.algorithms import ALGORITHMS, Algorithm, Case, Unavailable

__all__ = ["GOAL", "plots", "print_table", "run"]

GOAL = 1.0
"""The goal for seconds over the best peer's seconds."""


@dataclass(slots=True)
class _Rounds:
    """The measurements at one size.

    Attributes:
        timings: Timings of the slowest rank of every round, by algorithm and density (None for a dense algorithm).
        facts: Other fields of the rows, by the same keys.
    """

    timings: dict[tuple[str, float | None], Timing] = field(default_factory=dict)
    facts: dict[tuple[str, float | None], dict[str, Any]] = field(default_factory=dict)


@bench("collectives", keys=("algorithm", "density", "numel", "world"), measures=("seconds", "peer_ratio"))
def run(
    numels: Sequence[int] = (1_024, 32_768, 1_048_576, 4_194_304),
    densities: Sequence[float] = (0.001, 0.01),
    algorithms: Sequence[str] | None = None,
    repeats: int = 15,
) -> dict[str, Any]:
    """Averages gradients with our collectives, Gloo's and MPI's, in turn. Run it under mpirun -n P.

    Goal: as fast as the best peer (ratio 1.0). A dense algorithm is compared only with dense peers. The gradients are
    random and independent, so ranks select different elements, which is the worst case for sparse sums.

    Args:
        numels: Elements of the gradient.
        densities: Fractions of the elements that sparse algorithms send.
        algorithms: Algorithms to measure. By default all but ring, halving, doubling, dense sum fp16, dense sum bf16
            (parts of dense sum) and hand-over (the way to the engine's thread and back).
        repeats: Timed rounds.

    Returns:
        ``{"meta": {...}, "rows": [...]}``. A row has algorithm, role, density (None: dense), numel, world, transport,
        seconds (of the slowest rank, median over rounds), spread, bytes_sent (by rank 0), bytes_are ("counted" or
        "computed"), relative_error (of one average), best_peer, peer_ratio (seconds over those of best_peer, median
        over rounds), goal and ok; or error, the reason why it could not run. Rows whose numel is None hold the
        geometric mean of peer_ratio over all sizes.

    Raises:
        ConfigError: The world has one rank, or an argument is not acceptable.
    """
    world = sc.init()
    chosen = _checked(world, numels, densities, algorithms, repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        info = meta() | {"world": world.size, "transport": world.transport}
        for numel in numels:
            rows += _rows_of(world, numel, _measure(world, numel, densities, chosen, repeats), chosen)
    finally:
        torch.set_num_threads(threads)
    return {"meta": info, "rows": rows + _means(rows)}


def _checked(
    world: sc.World,
    numels: Sequence[int],
    densities: Sequence[float],
    names: Sequence[str] | None,
    repeats: int,
) -> list[Algorithm]:
    if world.size < 2:
        raise ConfigError(
            f"a world of {world.size} has nothing to exchange: mpirun -n 2 sparsecomm bench collectives (or more)"
        )
    for name in names or ():
        if name not in ALGORITHMS:
            raise ConfigError(f"algorithm {name!r} does not exist; known are {', '.join(ALGORITHMS)}")
    for numel in numels:
        if numel < 1:
            raise ConfigError(f"numel = {numel} is not a positive number of elements")
    for density in densities:
        if not 0 < density <= 1:
            raise ConfigError(f"density = {density} is not in (0, 1]")
    if repeats < 1:
        raise ConfigError(f"repeats = {repeats} is not a positive number of rounds")
    return [a for n, a in ALGORITHMS.items() if (n in names if names is not None else a.role != "part")]


def _measure(
    world: sc.World, numel: int, densities: Sequence[float], chosen: Iterable[Algorithm], repeats: int
) -> _Rounds:
    source = torch.randn(numel, generator=torch.Generator().manual_seed(world.rank), dtype=torch.float32)
    exact = source.double()
    dist.all_reduce(exact)
    exact /= world.size
    work = torch.empty_like(source)

    def start_line() -> None:
        work.copy_(source)
        world.barrier()

    found, ready = _Rounds(), {}
    for each in chosen:
        for density in densities if each.sparse else (None,):
            key = (each.name, density)
            try:
                one = ready[key] = each.prepare(Case(world, work, 1.0 if density is None else density))
            except Unavailable as reason:
                found.facts[key] = {"error": str(reason)}
                continue
            start_line()
            one.call()
            error = None if each.role == "floor" else float((work.double() - exact).norm() / exact.norm())
            found.facts[key] = {"relative_error": error}
    timings = alternate({key: r.call for key, r in ready.items()}, repeats=repeats, warmup=2, before=start_line)
    for key, mine in timings.items():
        found.timings[key] = timing(slowest(mine.samples))
        found.facts[key] |= {
            "bytes_sent": ready[key].bytes_sent(),
            "bytes_are": "counted" if ready[key].counted else "computed",
        }
    return found


def _rows_of(world: sc.World, numel: int, found: _Rounds, chosen: Iterable[Algorithm]) -> list[dict[str, Any]]:
    roles = {a.name: a.role for a in chosen}
    rows = []
    for (name, density), facts in found.facts.items():
        row = {
            "algorithm": name,
            "role": roles[name],
            "density": density,
            "numel": numel,
            "world": world.size,
            "transport": world.transport,
        } | facts
        mine = found.timings.get((name, density))
        if mine is not None:
            # Peers must be at least as exact, so a dense algorithm is never compared with a sparse one.
            peers = {k: t for k, t in found.timings.items() if roles[k[0]] == "peer" and k[1] in (None, density)}
            best = min(peers, key=lambda k: peers[k].seconds, default=None)
            ratio = None if best is None else mine.over(peers[best])
            goal = GOAL if roles[name] == "ours" and best is not None else None
            row |= {
                "seconds": mine.seconds,
                "spread": mine.spread,
                "best_peer": None if best is None else best[0],
                "peer_ratio": ratio,
                "goal": goal,
                "ok": verdict(ratio, goal),
            }
        rows.append(row)
    return rows


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each algorithm and density: the geometric mean over sizes of its ratio to the best peer."""
    ratios: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        if row["role"] != "floor" and row.get("peer_ratio"):
            ratios.setdefault((row["algorithm"], row["density"]), []).append(row)
    means = []
    for group in ratios.values():
        mean = math.exp(math.fsum(math.log(row["peer_ratio"]) for row in group) / len(group))
        same = {key: group[0][key] for key in ("algorithm", "role", "density", "world", "transport", "goal")}
        means.append(same | {"numel": None, "peer_ratio": mean, "ok": verdict(mean, group[0]["goal"])})
    return means


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of `run`."""
    columns = {
        "n": ("size", ""),
        "algorithm": ("who", ""),
        "density": ("density", "g"),
        "us": ("us", ",.0f"),
        "spread": ("spread", ".0%"),
        "bytes sent": ("sent", ">s"),
        "rel. error": ("relative_error", ".1e"),
        "x best peer": ("peer_ratio", ".2f"),
        "best peer": ("best_peer", ""),
        "verdict": ("ok", ""),
        "error": ("error", ""),
    }
    rows = [
        row
        | {
            "size": f"{row['numel']:,}" if row["numel"] else "all (geo. mean)",
            "who": f"{row['algorithm']} ({row['role']})",
            "us": row["seconds"] * 1e6 if "seconds" in row else None,
            "sent": _sent(row),
        }
        for row in result["rows"]
    ]
    if not any("error" in row for row in rows):
        del columns["error"]
    info = result["meta"]
    title = f"average of a gradient over {info['world']} ranks ({info['transport']}), including selection and coding"
    (console or Console()).print(table(title, rows, columns))


def _sent(row: dict[str, Any]) -> str:
    if "bytes_sent" not in row:
        return ""
    return ("" if row["bytes_are"] == "counted" else "about ") + f"{row['bytes_sent']:,}"


def plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws seconds and the ratio to the best peer against size; returns the files written."""
    timed = [row for row in result["rows"] if row.get("seconds") and row["numel"]]
    series = list(dict.fromkeys((row["algorithm"], row["role"], row["density"]) for row in timed))
    figure, axes = figures.new_figure(1, 2)
    (left, right), info = axes[0], result["meta"]
    for i, (name, role, density) in enumerate(series):
        mine = [row for row in timed if (row["algorithm"], row["density"]) == (name, density)]
        style = {
            "color": figures.COLOURS[list(ALGORITHMS).index(name) % len(figures.COLOURS)],
            "marker": figures.MARKERS[i % len(figures.MARKERS)],
            "linestyle": {"ours": "-", "peer": "--"}.get(role, ":"),
            "label": name + (f", {density:.3g}" if density is not None else "") + (f" ({role})"),
            "markersize": 5,
        }
        sizes = [4 * row["numel"] for row in mine]
        left.plot(sizes, [row["seconds"] for row in mine], **style)
        if role == "ours":
            right.plot(sizes, [row["peer_ratio"] for row in mine], **style)
    left.set(xscale="log", yscale="log", ylabel="median seconds of the slowest rank", title="Time of an average")
    right.axhline(1.0, color="black", linewidth=1)
    right.set(xscale="log", yscale="log", ylabel="time over the best peer's", title="Ours (below 1: faster)")
    figures.unit_axis(left.yaxis, "s")
    figures.ratio_axis(right.yaxis)
    for axis in (left, right):
        axis.set_xlabel("gradient, bytes as float32")
        figures.unit_axis(axis.xaxis, "B")
    figures.legend_below(figure, axes, columns=3)
    figures.headline(figure, info, f"{info['world']} ranks over {info['transport']}")
    return figures.save(figure, folder, f"collectives_{info['world']}_ranks")
