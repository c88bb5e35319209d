"""`bench kernels`: speed of the compute kernels, relative to memory bandwidth and to torch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsecomm import kernels
from sparsecomm.tools.benches import Timing, alternate, bench, figures, gpu, meta, table, verdict
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["plots", "print_table", "run"]

RESNET50 = 25_557_032
"""Number of parameters of ResNet-50, the default length of the vector."""


@bench("kernels", keys=("op", "codec", "path", "density", "numel", "metric"), measures=("seconds", "measured"))
def run(
    numel: int | None = None,
    densities: Sequence[float] = (0.001, 0.01, 0.1),
    paths: Sequence[str] | None = None,
    repeats: int = 15,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times selection, index encoding, and decoding with addition, on one thread or on a GPU.

    Goals on the CPU: accumulate_select takes at most 1.25 times as long as the floor, `residual.add_(grad)`, up to 1%
    density and 1.6 times at 10%; exact_topk at most 3.5 times the floor and 1/20 of the same in torch; BITPACK encoding
    at most 2 ns per index; decoding and adding no longer than `torch.index_add_` with indices already in int64.

    Goals on a GPU: accumulate_select reaches 80% of the copy bandwidth of the same run; exact_topk takes at most 3.5
    times as long as accumulate_select and 1/10 as long as torch.topk; encoding, decoding and applying for 8 ranks at
    0.1% density take at most 1/4 of accumulate_select; selecting from 512 MB and encoding at 0.1% take at most 1 ms.

    Args:
        numel: Elements of the dense vector; by default 25,557,032 (ResNet-50's) on the CPU and 2**28 on a GPU.
        densities: Nonzeros over elements.
        paths: Kernel paths, by default all that run on the CPU. Only SIMD paths have goals.
        repeats: Timed rounds.
        device: Device to measure on, cpu or cuda.

    Returns:
        ``{"meta": {...}, "rows": [...]}``. A row has op, path, density, numel, nnz, seconds, spread, metric, measured,
        goal and ok, and depending on op also codec, bits_per_index, floor_seconds, floor_ratio, torch_seconds,
        torch_ratio (ours over torch's) and ns_per_index.

    Raises:
        ConfigError: This machine cannot measure on that device.
    """
    if device != "cpu":
        where = gpu.check_device(device)
        info = meta() | {"gpu": torch.cuda.get_device_name(where), "kernel_path": "triton"}
        return {"meta": info, "rows": gpu.measure(where, numel or gpu.GPU_NUMEL, densities, repeats)}
    numel = numel or RESNET50
    before, threads = kernels.current_path(), torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    try:
        info = meta()
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        for density in densities:
            k = max(1, round(numel * density))
            for path in paths or [p for p in kernels.available_paths() if p != "triton"]:  # the CPU only interprets it
                kernels.set_path(path)
                rounds = max(3, repeats // 5) if path == "reference" else repeats
                for row in (*_selecting(grad, k, rounds), *_decoding(grad, k, rounds)):
                    simd = path.startswith("avx")
                    goal = row.pop("goal", None) if simd else row.pop("goal", None) and None
                    rows.append(
                        {"op": row.pop("op"), "path": path, "density": density, "numel": numel, "nnz": k}
                        | row
                        | {"goal": goal, "ok": verdict(row["measured"], goal)}
                    )
    finally:
        kernels.set_path(before)
        torch.set_num_threads(threads)
    return {"meta": info, "rows": rows}


def _torch_topk(grad: torch.Tensor, residual: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the k largest elements with torch's operations alone."""
    residual.add_(grad)
    indices = residual.abs().topk(k, sorted=False).indices
    values = residual[indices]
    residual[indices] = 0.0
    return indices, values


def _selecting(grad: torch.Tensor, k: int, repeats: int) -> list[dict[str, Any]]:
    n = grad.numel()
    density = k / n
    residual = torch.zeros(n, dtype=torch.float32)
    room = k + k // 4 + 64
    indices, values = torch.empty(room, dtype=torch.uint32), torch.empty(room, dtype=torch.float32)
    threshold = kernels.exact_topk(grad, residual, k, indices, values).threshold

    def rest() -> None:
        # Every round must select from the same vector. Writing the whole residual also brings the caches into the same
        # state before each task.
        residual.zero_()

    timings = alternate(
        {
            "floor": lambda: residual.add_(grad),
            "select": lambda: kernels.accumulate_select(grad, residual, threshold, indices, values),
            "topk": lambda: kernels.exact_topk(grad, residual, k, indices, values),
            "torch": lambda: _torch_topk(grad, residual, k),
        },
        repeats=repeats,
        before=rest,
        slow=["torch"],
    )
    base, torch_way = timings["floor"], timings["torch"]

    def against_floor(op: str, timing: Timing, goal: float) -> dict[str, Any]:
        ratio = timing.over(base)
        return {
            "op": op,
            "seconds": timing.seconds,
            "spread": timing.spread,
            "floor_seconds": base.seconds,
            "floor_ratio": ratio,
            "torch_seconds": torch_way.seconds,
            "torch_ratio": timing.over(torch_way),
            "metric": "x floor",
            "measured": ratio,
            "goal": goal,
        }

    topk = against_floor("exact_topk", timings["topk"], 3.5)
    faster = topk | {"metric": "x torch", "measured": topk["torch_ratio"], "goal": 0.05}
    return [
        against_floor("accumulate_select", timings["select"], 1.25 if density < 0.05 else 1.6),
        topk,
        faster,
    ]


def _decoding(grad: torch.Tensor, k: int, repeats: int) -> list[dict[str, Any]]:
    n = grad.numel()
    indices, values = torch.empty(k, dtype=torch.uint32), torch.empty(k, dtype=torch.float32)
    kernels.exact_topk(None, grad.clone(), k, indices, values)
    wide = indices.to(torch.int64)
    value_bytes = torch.empty(kernels.max_value_bytes(ValueCodec.FP32, k), dtype=torch.uint8)
    kernels.encode_values(ValueCodec.FP32, values, value_bytes)
    out = torch.zeros(n, dtype=torch.float32)
    got_indices, got_values = torch.empty_like(indices), torch.empty_like(values)
    rows: list[dict[str, Any]] = []
    for codec in (IndexCodec.BITPACK, IndexCodec.RICE):
        buffer = torch.empty(kernels.max_index_bytes(codec, k, n), dtype=torch.uint8)
        encoded = buffer[: kernels.encode_indices(codec, indices, n, buffer)]

        def encode(codec: IndexCodec = codec, buffer: torch.Tensor = buffer) -> None:
            kernels.encode_indices(codec, indices, n, buffer)

        def decode_add(codec: IndexCodec = codec, encoded: torch.Tensor = encoded) -> None:
            kernels.decode_indices(codec, encoded, k, n, got_indices)
            kernels.decode_values(ValueCodec.FP32, value_bytes, k, 1.0, got_values)
            kernels.scatter_add(out, got_indices, got_values)

        timings = alternate(
            {"encode": encode, "decode_add": decode_add, "torch": lambda: out.index_add_(0, wide, values)},
            repeats=repeats,
        )
        coding, adding, torch_way = timings["encode"], timings["decode_add"], timings["torch"]
        common = {"codec": codec.name, "bits_per_index": 8 * encoded.numel() / k}
        rows.append(
            {
                "op": "encode",
                "seconds": coding.seconds,
                "spread": coding.spread,
                "ns_per_index": coding.seconds / k * 1e9,
                "metric": "ns/index",
                "measured": coding.seconds / k * 1e9,
                "goal": 2.0 if codec == IndexCodec.BITPACK else None,
            }
            | common
        )
        ratio = adding.over(torch_way)
        rows.append(
            {
                "op": "decode_add",
                "seconds": adding.seconds,
                "spread": adding.spread,
                "torch_seconds": torch_way.seconds,
                "torch_ratio": ratio,
                "ns_per_index": adding.seconds / k * 1e9,
                "metric": "x torch",
                "measured": ratio,
                "goal": 1.0 if codec == IndexCodec.BITPACK else None,
            }
            | common
        )
    return rows


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of `run`."""
    columns = {
        "op": ("op", ""),
        "codec": ("codec", ""),
        "path": ("path", ""),
        "density": ("density", "g"),
        "ms": ("ms", ".3f"),
        "spread": ("spread", ".0%"),
        "measured": ("measured", ".3f"),
        "unit": ("metric", ""),
        "goal": ("goal", "g"),
        "verdict": ("ok", ""),
    }
    rows = [row | {"ms": row["seconds"] * 1e3} for row in result["rows"]]
    numel = rows[0]["numel"] if rows else 0
    where = result["meta"].get("gpu") or f"one thread, {result['meta']['cpu']}"
    title = f"kernels, n = {numel:,}, {where}"
    (console or Console()).print(table(title, rows, columns))


_FLOOR_BYTES = 12.0  # per element: read the residual and the gradient, write the residual


def _bytes_an_element(row: dict[str, Any]) -> float:
    """Returns the least memory traffic of an operation, in bytes per element of the dense vector.

    Memory is moved in cache lines, so scattered reads and writes actually move up to 16 times as much.
    """
    pair, coded = 8.0, float(row.get("bits_per_index", 0.0)) / 8
    an_index = {"encode": 4.0 + coded, "decode_add": coded + 4.0 + pair}  # indices and codes; codes, values, sums
    density = float(row["nnz"]) / float(row["numel"])
    if row["op"] in an_index:
        return an_index[row["op"]] * density
    return _FLOOR_BYTES + pair * density


def plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws a roofline per kernel path, bandwidth against least bytes moved per element; returns the files written."""
    if "gpu" in result["meta"]:
        return []  # rows of a GPU are already ratios
    rows = [row for row in result["rows"] if row.get("metric") != "x torch" or row["op"] == "decode_add"]
    paths = list(dict.fromkeys(row["path"] for row in rows))
    series = list(dict.fromkeys((row["op"], row.get("codec")) for row in rows))
    densities = sorted({row["density"] for row in rows})
    columns = min(2, len(paths))
    figure, axes = figures.new_figure(-(-len(paths) // columns), columns, sharex=True, sharey=True)
    for unused in axes.flat[len(paths) :]:
        unused.set_visible(False)
    for axis, path in zip(axes.flat, paths, strict=False):
        mine = [row for row in rows if row["path"] == path]
        floor = min(row["floor_seconds"] for row in mine if "floor_seconds" in row)
        bandwidth = _FLOOR_BYTES * mine[0]["numel"] / floor
        axis.axhline(bandwidth, color="black", linewidth=1)
        axis.plot(
            [_FLOOR_BYTES], [bandwidth], "*", color="black", markersize=13, label="residual.add_(grad), the floor"
        )
        for (op, codec), colour in zip(series, figures.COLOURS, strict=False):
            dots = [row for row in mine if (row["op"], row.get("codec")) == (op, codec)]
            x = [_bytes_an_element(row) for row in dots]
            y = [_bytes_an_element(row) * row["numel"] / row["seconds"] for row in dots]
            axis.plot(x, y, "-", color=colour, linewidth=0.8, alpha=0.6)
            axis.plot([], [], "o-", color=colour, label=op.replace("_", " ") + (f", {codec.lower()}" if codec else ""))
            for row, *dot in zip(dots, x, y, strict=True):
                marker = figures.MARKERS[densities.index(row["density"]) % len(figures.MARKERS)]
                axis.plot(*([v] for v in dot), marker, color=colour, markersize=6)
        axis.set(xscale="log", yscale="log", title=path)
        figures.unit_axis(axis.yaxis, "B/s")
        figures.ratio_axis(axis.xaxis, subs=(1.0,))
    for marker, density in zip(figures.MARKERS, densities, strict=False):
        axes[0, 0].plot([], [], marker, color="grey", label=f"density {density:g}")
    for axis in axes[-1]:
        axis.set_xlabel("least bytes moved per element of the dense vector")
    for axis in axes[:, 0]:
        axis.set_ylabel("bandwidth, of those bytes")
    figures.legend_below(figure, axes)
    numel = rows[0]["numel"] if rows else 0
    figures.headline(figure, result["meta"], f"kernels, one thread, n = {numel:,}")
    return figures.save(figure, folder, "kernels_roofline")
