"""`bench hook`: the hook's overhead over kernels and messages; `bench overlap`: communication hidden by backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.exchange.config import FUSE_BYTES
from sparsecomm.tools.benches import bench, meta, table, verdict
from sparsecomm.tools.benches.methods import silent_hook
from sparsecomm.transport import IN_FLIGHT, Channel, CollectiveSteps, Request
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES

__all__ = ["print_table", "run", "run_overlap"]

_GOAL, _GOAL_SMALL = 1.04, 1.8  # times the same kernels and messages by hand; for buckets below FUSE_BYTES


@bench("hook", keys=("buckets", "numel", "world", "fuse_bytes"), measures=("seconds", "ratio"))
def run(
    shapes: Sequence[str] = ("1000x1024", "10x2500000"),
    density: float = 0.01,
    repeats: int = 9,
    fuse_bytes: Sequence[int] = (FUSE_BYTES, 0),
) -> dict[str, Any]:
    """Times exchanges of a SparseState against the same kernels and messages called directly. Also runs under mpirun.

    The ratio of a bucket is that of the two times, each the minimum over rounds, since medians would mostly show other
    load on the machine. Direct calls exchange each bucket by itself. They take longer than kernels and messages timed
    separately, because ranks also wait for each other's kernels.

    Args:
        shapes: Numbers of buckets and of elements in each, such as "1000x1024".
        density: Fraction of the elements to select.
        repeats: Timed rounds.
        fuse_bytes: Values of the option of that name.

    Returns:
        ``{"meta": {...}, "rows": [...]}`` with a row per shape and fuse_bytes: buckets, numel, world, fuse_bytes,
        seconds, bare_seconds (direct calls), kernel_seconds and message_seconds (each timed separately),
        overhead_seconds (all per bucket), ratio (of seconds and bare_seconds), goal, ok.
    """
    world = sc.init()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for shape in shapes:
            buckets, numel = (int(x) for x in shape.split("x"))
            for limit in fuse_bytes:
                row = _times(
                    world, buckets, numel, sc.SparseConfig(compressor=sc.TopK(density), fuse_bytes=limit), repeats
                )
                rows.append({"buckets": buckets, "numel": numel, "world": world.size, "fuse_bytes": limit, **row})
    finally:
        torch.set_num_threads(threads)
    return {"meta": meta() | {"world": world.size}, "rows": rows}


def _times(world: sc.World, buckets: int, numel: int, config: sc.SparseConfig, repeats: int) -> dict[str, Any]:
    parameters = [torch.nn.Parameter(torch.zeros(numel, dtype=torch.float32)) for _ in range(buckets)]
    model = torch.nn.ParameterList(parameters)
    state = sc.SparseState(config, model=model, collective="allgather", index_codec="rice")
    generator = torch.Generator().manual_seed(world.rank)
    grads = [torch.randn(numel, generator=generator, dtype=torch.float32) for _ in range(buckets)]

    last = buckets - 1

    def whole() -> None:
        futures = [state.start(i, [parameters[i]], grads[i], last=i == last) for i in range(buckets)]
        for future in futures:
            future.wait()

    bare = _ByHand(world, grads, config.compressor.k_for(numel, 0))
    tasks = {"whole": whole, "kernels": bare.kernels, "messages": bare.messages, "bare": bare.exchanges}
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(-2, repeats):
        for name, task in tasks.items():
            for g in grads:
                g.normal_(generator=generator)
            seconds = _timed(task, world)
            if round_ >= 0:
                samples[name].append(seconds / buckets if name != "messages" or world.size > 1 else 0.0)
    whole_s, kernel_s, message_s, bare_s = (min(samples[n]) for n in tasks)
    ratio, goal = whole_s / bare_s, _GOAL_SMALL if 4 * numel < FUSE_BYTES else _GOAL
    return {
        "seconds": whole_s,
        "kernel_seconds": kernel_s,
        "message_seconds": message_s,
        "bare_seconds": bare_s,
        "overhead_seconds": whole_s - bare_s,
        "ratio": ratio,
        "goal": goal,
        "ok": verdict(ratio, goal),
    }


def _timed(task: Callable[[], object], world: sc.World) -> float:
    if world.size > 1:
        world.barrier()
    start = perf_counter()
    task()
    return perf_counter() - start


@dataclass(slots=True)
class _InFlight:
    """Memory of one exchange from selection to application, as much as a real exchange uses."""

    residual: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor
    data: torch.Tensor
    nnz: int = 0
    index_bytes: int = 0
    value_bytes: int = 0
    scale: float = 1.0


class _ByHand:
    """The kernels and messages of exchanges, called directly.

    Order and memory are those of real exchanges with as many in flight as the engine allows, because the state of the
    caches and the wait for the kernels of other ranks are part of the cost.
    """

    def __init__(self, world: sc.World, grads: Sequence[torch.Tensor], k: int) -> None:
        self._world = world
        numel = self._numel = grads[0].numel()
        room = kernels.max_index_bytes(IndexCodec.RICE, k, numel) + 2 * k
        memory = [
            _InFlight(
                torch.zeros(numel, dtype=torch.float32),
                torch.empty(k, dtype=torch.uint32),
                torch.empty(k, dtype=torch.float32),
                torch.empty(room, dtype=torch.float32).byte(),
            )
            for _ in grads
        ]
        buckets = list(zip(grads, memory, strict=True))
        self._groups = [buckets[first : first + IN_FLIGHT] for first in range(0, len(buckets), IN_FLIGHT)]
        self._error = torch.empty(k, dtype=torch.float32)
        self._decoded = [
            (torch.empty(k, dtype=torch.uint32), torch.empty(k, dtype=torch.float32)) for _ in range(world.size)
        ]
        self._header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        body = kernels.estimate_index_bytes(IndexCodec.RICE, k, numel) + kernels.max_value_bytes(ValueCodec.FP16, k)
        self._body = torch.zeros(body, dtype=torch.uint8)
        others = range(1, world.size)
        self._into = {d: (torch.empty_like(self._header), torch.empty_like(self._body)) for d in others}

    def _send(self, grad: torch.Tensor, m: _InFlight) -> None:
        n = m.nnz = kernels.exact_topk(grad, m.residual, m.values.numel(), m.indices, m.values).stored
        m.index_bytes = kernels.encode_indices(IndexCodec.RICE, m.indices[:n], self._numel, m.data)
        m.value_bytes, m.scale = kernels.encode_values(
            ValueCodec.FP16, m.values[:n], m.data[m.index_bytes :], self._error[:n]
        )
        kernels.crc32c(m.data[: m.index_bytes + m.value_bytes])
        kernels.crc32c(self._header)
        kernels.scatter_add(m.residual, m.indices[:n], self._error[:n])

    def _receive(self, grad: torch.Tensor, m: _InFlight) -> None:
        n, body = m.nnz, m.data[: m.index_bytes + m.value_bytes]
        for rank, (indices, values) in enumerate(self._decoded):
            if rank:
                kernels.crc32c(self._header)
                kernels.crc32c(body)
                kernels.decode_indices(IndexCodec.RICE, body[: m.index_bytes], n, self._numel, indices[:n])
            kernels.decode_values(ValueCodec.FP16, body[m.index_bytes :], n, m.scale, values[:n])
        own = (m.indices[:n], self._decoded[0][1][:n])
        others = ((i[:n], v[:n]) for i, v in self._decoded[1:])
        kernels.scatter_reduce(grad, [own, *others], scale=1.0 / self._world.size)

    def _post(self, channel: Channel, which: int) -> list[Request]:
        data = self._body if which else self._header
        requests = [channel.irecv(i[which], (channel.rank - d) % channel.size) for d, i in self._into.items()]
        return requests + [channel.isend(data, (channel.rank + d) % channel.size) for d in self._into]

    def kernels(self) -> None:
        """Runs the kernels alone."""
        for group in self._groups:
            for bucket in group:
                self._send(*bucket)
            for bucket in group:
                self._receive(*bucket)

    def messages(self) -> None:
        """Sends the messages alone, one exchange after another. Collective."""

        def steps(channel: Channel) -> CollectiveSteps[None]:
            for _ in (bucket for group in self._groups for bucket in group):
                yield self._post(channel, 0)
                yield self._post(channel, 1)
                channel.pending.clear()

        self._world.engine.call("bench messages", steps)

    def exchanges(self) -> None:
        """Runs kernels and messages together. Collective.

        Headers are sent as soon as a bucket is selected, and bodies as soon as the headers of all ranks have arrived.
        """

        def steps(channel: Channel) -> CollectiveSteps[None]:
            for group in self._groups:
                headers, bodies = [], []
                for bucket in group:
                    self._send(*bucket)
                    headers.append(self._post(channel, 0))
                for requests in headers:
                    yield requests
                    bodies.append(self._post(channel, 1))
                for requests, bucket in zip(bodies, group, strict=True):
                    yield requests
                    self._receive(*bucket)
                channel.pending.clear()

        self._world.engine.call("bench exchanges", steps)


@bench(
    "overlap",
    keys=("world", "numel", "buckets"),
    measures=("sparse_backward_seconds", "communication_seconds", "exposed_seconds", "hidden"),
)
def run_overlap(
    width: int = 1024,
    layers: int = 12,
    batch: int = 64,
    density: float = 0.01,
    bucket_mb: int = 4,
    repeats: int = 9,
) -> dict[str, Any]:
    """Times backward of a DDP model with sparse_hook and with an empty hook. Run it under mpirun.

    Args:
        width: Width of the square layers.
        layers: Number of layers.
        batch: Examples per rank.
        density: Fraction of the elements to select.
        bucket_mb: DDP's bucket_cap_mb.
        repeats: Timed rounds.

    Returns:
        ``{"meta": {...}, "rows": [...]}`` with one row: world, numel, buckets, backward_seconds (with an empty hook),
        sparse_backward_seconds, added_seconds (their difference), communication_seconds (from the submission of the
        first bucket to the end of the last exchange), exposed_seconds (from the submission of the last bucket to that
        end), hidden (fraction of communication_seconds that backward hides), ok (exposed <= communication).
    """
    world = sc.init()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        row = _overlap(world, width, layers, batch, density, bucket_mb, repeats)
    finally:
        torch.set_num_threads(threads)
    return {"meta": meta() | {"world": world.size}, "rows": [row]}


def _overlap(
    world: sc.World, width: int, layers: int, batch: int, density: float, bucket_mb: int, repeats: int
) -> dict[str, Any]:
    def model() -> DistributedDataParallel:
        torch.manual_seed(0)
        inner = torch.nn.Sequential(*(torch.nn.Linear(width, width, dtype=torch.float32) for _ in range(layers)))
        return DistributedDataParallel(inner, bucket_cap_mb=bucket_mb)

    plain, sparse = model(), model()
    plain.register_comm_hook(None, silent_hook)
    state = sc.SparseState(sc.TopK(density=density), collective="allgather")
    sparse.register_comm_hook(state, sc.sparse_hook)
    x = torch.randn(batch, width, dtype=torch.float32)
    samples: dict[str, list[float]] = {"plain": [], "sparse": [], "communication": [], "exposed": []}
    for round_ in range(-2, repeats):
        for name, ddp in (("plain", plain), ("sparse", sparse)):
            loss = ddp(x).square().mean()
            seconds = _timed(loss.backward, world)
            if round_ >= 0:
                samples[name].append(seconds)
        if round_ >= 0:
            samples["communication"].append(state.last_step().communication_seconds)
            samples["exposed"].append(state.last_step().exposed_seconds)
    m = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "world": world.size,
        "numel": sum(p.numel() for p in plain.parameters()),
        "buckets": len(state.buckets()),
        "backward_seconds": m["plain"],
        "sparse_backward_seconds": m["sparse"],
        "added_seconds": m["sparse"] - m["plain"],
        "communication_seconds": m["communication"],
        "exposed_seconds": m["exposed"],
        "hidden": 1.0 - m["exposed"] / m["communication"],
        "ok": verdict(m["exposed"], m["communication"]),
    }


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of either bench."""
    rows = result["rows"]
    if "hidden" in rows[0]:
        columns = {
            "ranks": ("world", "d"),
            "buckets": ("buckets", "d"),
            "bwd s": ("backward_seconds", ".4f"),
            "hook s": ("sparse_backward_seconds", ".4f"),
            "comm s": ("communication_seconds", ".4f"),
            "exposed s": ("exposed_seconds", ".4f"),
            "hidden": ("hidden", ".0%"),
            "": ("ok", ""),
        }
        title = "overlap: share of the communication that backward hides"
    else:
        rows = [{k: v * 1e6 if k.endswith("seconds") else v for k, v in row.items()} for row in rows]
        columns = {
            "ranks": ("world", "d"),
            "buckets": ("buckets", "d"),
            "n": ("numel", "d"),
            "fuse": ("fuse_bytes", "d"),
            "us": ("seconds", ".0f"),
            "kernels": ("kernel_seconds", ".0f"),
            "msgs": ("message_seconds", ".0f"),
            "bare": ("bare_seconds", ".0f"),
            "over": ("overhead_seconds", ".0f"),
            "ratio": ("ratio", ".2f"),
            "goal": ("goal", ".2f"),
            "": ("ok", ""),
        }
        title = "hook: microseconds per bucket, and their ratio to the same kernels and messages by hand (bare)"
    (console or Console()).print(table(title, rows, columns))
