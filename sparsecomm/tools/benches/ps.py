"""`bench ps`: throughput of the parameter server with a slow worker; `bench ps_server`: cost of a push on a server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from sparsecomm import kernels, ps
from sparsecomm.compress import TopK
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.payloads import PUSH, Origin, decode
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.worker.part import Part
from sparsecomm.runtime.arena import Arena
from sparsecomm.tools.benches import alternate, bench, meta, table, verdict

__all__ = ["print_table", "run", "run_server"]

_GOAL = 0.9


class _Flat(torch.nn.Module):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(numel, dtype=torch.float32))


@bench(
    "ps", keys=("mode", "workers", "servers", "slowdown", "numel", "density"), measures=("pushes_a_second", "fraction")
)
def run(
    servers: int = 1,
    seconds: float = 12.0,
    compute_ms: float = 200.0,
    slowdown: float = 10.0,
    numel: int = 100_000,
    density: float = 0.01,
    bounds: Sequence[int] = (4, 1000),
) -> dict[str, Any]:
    """Measures pushes per second in each mode of the server, with a slow worker. Run it under mpirun -n 4 or more.

    The workers sleep instead of computing, so that workers on the same core do not slow each other down. Goal: at
    least 0.9 of the rate of the other workers without a slow one. It applies to the asynchronous mode and to
    stale-synchronous modes that do not reach their bound. When the bound is reached, all workers run at the speed of
    the slowest, as in synchronous mode.

    Args:
        servers: Number of ranks that serve.
        seconds: Seconds that each mode runs.
        compute_ms: Milliseconds of computation per step.
        slowdown: Factor by which the last worker is slower.
        numel: Elements of the model.
        density: Density of pushes; that of pulls is twice as high.
        bounds: Bounds of the stale-synchronous mode.

    Returns:
        ``{"meta": ..., "rows": ...}``. A row has mode, bound, workers, servers, slowdown, numel, density,
        pushes_a_second, fraction (of the rate of the other workers: workers - 1 times the rate of a worker in the first
        row), lead (pushes by which the fastest worker is ahead of the slowest at the end), staleness (mean over all
        pushes), goal and ok.

    Raises:
        ConfigError: There are fewer than two workers, or a time is not positive.
    """
    if not (seconds > 0 and compute_ms > 0 and slowdown >= 1):
        given = f"seconds = {seconds}, compute_ms = {compute_ms}, slowdown = {slowdown}"
        raise ConfigError(f"need seconds and compute_ms > 0 and slowdown >= 1, got {given}")
    modes: list[tuple[ps.Mode, float]] = [(ps.Asynchronous(), 1.0), (ps.Synchronous(), slowdown)]
    modes += [(ps.StaleSynchronous(b), slowdown) for b in bounds] + [(ps.Asynchronous(), slowdown)]
    rows: list[dict[str, Any]] = []
    for mode, factor in modes:
        row = _measure(mode, factor, servers, seconds, compute_ms / 1e3, numel, density)
        if row is not None:
            rows.append(row)
    for row in rows[1:]:
        row["fraction"] = row["pushes_a_second"] / (rows[0]["pushes_a_second"] * (1 - 1 / row["workers"]))
        free = row["mode"] == "Asynchronous()" or (row["mode"] != "Synchronous()" and row["lead"] < row["bound"])
        row["goal"] = _GOAL if free else None
        row["ok"] = verdict(-row["fraction"], None if row["goal"] is None else -row["goal"])
    return {"meta": meta(), "rows": rows}


def _measure(
    mode: ps.Mode, slowdown: float, servers: int, seconds: float, compute: float, numel: int, density: float
) -> dict[str, Any] | None:
    """Runs one mode. Returns its row on the first worker and None on all other ranks."""

    def train(rank: int, size: int) -> dict[str, Any]:
        if size < 2:
            raise ConfigError(f"bench ps needs at least 2 workers, got {size}; start more ranks")
        model = _Flat(numel)
        worker = ps.Worker(model, TopK(density))
        mine = compute * (slowdown if rank == size - 1 else 1.0)
        gradient = torch.randn(numel, generator=torch.Generator().manual_seed(rank), dtype=torch.float32)
        end = time.perf_counter() + seconds
        while time.perf_counter() + mine < end:
            time.sleep(mine)
            model.weight.grad = gradient
            worker.step()
        shard = worker.statistics()[0]
        clocks = {int(w): t["pushes"] for w, t in shard["workers"].items()}
        stale = sum(t["stale"] for t in shard["workers"].values())
        return {
            "mode": str(mode),
            "bound": getattr(mode, "bound", None),
            "workers": size,
            "servers": servers,
            "slowdown": slowdown,
            "numel": numel,
            "density": density,
            "pushes_a_second": sum(clocks.values()) / seconds,
            "lead": max(clocks.values()) - min(clocks.values()),
            "staleness": stale / max(1, sum(clocks.values())),
        }

    def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01)

    pull = TopK(min(1.0, 2 * density))
    out = ps.run(train, optimizer=sgd, servers=servers, mode=mode, pull=pull)
    row: dict[str, Any] | None = out.result
    return row if out.rank == 0 else None


@bench("ps_server", keys=("numel", "density"), measures=("ratio",))
def run_server(
    numel: int = 4_000_000, densities: Sequence[float] = (0.001, 0.01, 0.1), repeats: int = 15
) -> dict[str, Any]:
    """Times a push on a server, without the optimizer, relative to scatter-add.

    The server checks a push (envelope, two checksums, header), decodes its positions and values, and adds them to a
    dense vector. The floor is the addition alone, of decoded positions and values. Goal: at most 2 times the floor.

    Args:
        numel: Elements of the shard.
        densities: Densities of the push.
        repeats: Timed rounds.

    Returns:
        ``{"meta": ..., "rows": ...}``. A row has numel, density, nnz, bytes, push_ms, floor_ms, ratio (of these),
        torch_ratio (over torch's index_add_ of decoded positions), goal and ok.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for density in densities:
        spec = ModelLayout(("weight",), ((numel,),)).shard(0, 1)
        part = Part(spec, SparseConfig.of(TopK(density), {}), (0, 2), clip=1.0, arena=Arena())
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        payload, nnz = part.encode(part.take(grad, 0), 0)
        message = ms.pack(Envelope(Kind.PUSH, 0, 0), payload)
        out = torch.zeros(numel, dtype=torch.float32)
        origin = Origin(PUSH, spec, rank=0, world=2, step=0)
        ready, _ = decode(origin, payload)
        wide = ready[0].to(torch.int64)

        def push(message: torch.Tensor = message, origin: Origin = origin, out: torch.Tensor = out) -> None:
            _, body = ms.unpack(message, 0)
            pairs, _ = decode(origin, body)
            kernels.scatter_add(out, *pairs)

        def floor(ready: Any = ready, out: torch.Tensor = out) -> None:
            kernels.scatter_add(out, *ready)

        def by_torch(wide: torch.Tensor = wide, ready: Any = ready, out: Any = out) -> None:
            out.index_add_(0, wide, ready[1])

        times = alternate({"push": push, "floor": floor, "torch": by_torch}, repeats=repeats, warmup=3)
        ratio = times["push"].over(times["floor"])
        rows.append(
            {
                "numel": numel,
                "density": density,
                "nnz": nnz,
                "bytes": message.numel(),
                "push_ms": times["push"].seconds * 1e3,
                "floor_ms": times["floor"].seconds * 1e3,
                "ratio": ratio,
                "torch_ratio": times["push"].over(times["torch"]),
                "goal": 2.0,
                "ok": verdict(ratio, 2.0),
            }
        )
    torch.set_num_threads(threads)
    return {"meta": meta(), "rows": rows}


_COLUMNS = {
    "mode": ("mode", ""),
    "slowdown": ("slowdown", "g"),
    "pushes/s": ("pushes_a_second", ".1f"),
    "of the others' sum": ("fraction", ".2f"),
    "goal": ("goal", "g"),
    "": ("ok", ""),
    "lead": ("lead", "d"),
    "staleness": ("staleness", ".1f"),
}
_SERVER_COLUMNS = {
    "density": ("density", "g"),
    "nonzeros": ("nnz", ",d"),
    "bytes": ("bytes", ",d"),
    "push ms": ("push_ms", ".3f"),
    "floor ms": ("floor_ms", ".3f"),
    "ratio": ("ratio", ".2f"),
    "over index_add_": ("torch_ratio", ".2f"),
    "goal": ("goal", "g"),
    "": ("ok", ""),
}


def print_table(result: dict[str, Any], console: Console) -> None:
    """Prints a result of either bench."""
    rows = result["rows"]
    if rows and "push_ms" in rows[0]:
        console.print(table(f"a push on a server, {rows[0]['numel']:,} elements", rows, _SERVER_COLUMNS))
    elif rows:
        title = f"{rows[0]['workers']} workers, {rows[0]['servers']} servers, the last worker slow"
        console.print(table(title, rows, _COLUMNS))
