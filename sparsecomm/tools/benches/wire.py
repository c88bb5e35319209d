"""`bench wire`: size, accuracy and speed of the codecs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from sparsecomm import kernels
from sparsecomm.tools.benches import alternate, bench, meta, table, verdict
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["print_table", "run"]


@bench(
    "wire",
    keys=("index_codec", "value_codec", "density", "numel"),
    measures=("index_bits", "value_bits", "encode_ns", "decode_ns"),
)
def run(
    numel: int = 25_557_032,
    densities: Sequence[float] = (0.001, 0.01, 0.1),
    repeats: int = 7,
) -> dict[str, Any]:
    """Encodes the largest elements of a random vector with every index codec and every value codec.

    Goals: RICE takes at most 1.06 times the entropy of uniform positions; BITPACK at most 1.15 times at 0.1% density.

    Args:
        numel: Elements of the dense vector.
        densities: Nonzeros over elements.
        repeats: Timed rounds.

    Returns:
        ``{"meta": {...}, "rows": [...]}``. The row of an index codec has index_codec, index_bits (per nonzero),
        entropy_bits, ratio (of these) and estimate_ratio (estimated over real size); the row of a value codec has
        value_codec, value_bits (per nonzero) and relative_error (in the L2 norm). Both have density, numel, nnz,
        encode_ns and decode_ns (per nonzero), spread, goal and ok.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        info = meta()
        vector = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        for density in densities:
            k = max(1, round(numel * density))
            indices, values = torch.empty(k, dtype=torch.uint32), torch.empty(k, dtype=torch.float32)
            kernels.exact_topk(None, vector.clone(), k, indices, values)
            common = {"density": density, "numel": numel, "nnz": k}
            rows += [
                common | _index_row(codec, indices, numel, repeats, density)
                for codec in IndexCodec
                if codec != IndexCodec.DENSE
            ]
            rows += [common | _value_row(codec, values, repeats) for codec in ValueCodec]
    finally:
        torch.set_num_threads(threads)
    return {"meta": info, "rows": rows}


def _index_row(codec: IndexCodec, indices: torch.Tensor, numel: int, repeats: int, density: float) -> dict[str, Any]:
    k = indices.numel()
    buffer = torch.empty(kernels.max_index_bytes(codec, k, numel), dtype=torch.uint8)
    encoded = buffer[: kernels.encode_indices(codec, indices, numel, buffer)]
    back = torch.empty_like(indices)
    timings = alternate(
        {
            "encode": lambda: kernels.encode_indices(codec, indices, numel, buffer),
            "decode": lambda: kernels.decode_indices(codec, encoded, k, numel, back),
        },
        repeats=repeats,
    )
    bits, entropy = 8 * encoded.numel() / k, kernels.entropy_bits(k, numel)
    ratio = bits / entropy if entropy else None
    goal = {IndexCodec.RICE: 1.06, IndexCodec.BITPACK: 1.15 if density <= 0.001 else None}.get(codec)
    return {
        "index_codec": codec.name,
        "index_bits": bits,
        "entropy_bits": entropy,
        "ratio": ratio,
        "estimate_ratio": kernels.estimate_index_bytes(codec, k, numel) / max(encoded.numel(), 1),
        "encode_ns": timings["encode"].seconds / k * 1e9,
        "decode_ns": timings["decode"].seconds / k * 1e9,
        "spread": max(t.spread for t in timings.values()),
        "goal": goal,
        "ok": verdict(ratio, goal),
    }


def _value_row(codec: ValueCodec, values: torch.Tensor, repeats: int) -> dict[str, Any]:
    k = values.numel()
    buffer = torch.empty(kernels.max_value_bytes(codec, k), dtype=torch.uint8)
    error, back = torch.empty_like(values), torch.empty_like(values)
    written, scale = kernels.encode_values(codec, values, buffer, error)
    timings = alternate(
        {
            "encode": lambda: kernels.encode_values(codec, values, buffer, error),
            "decode": lambda: kernels.decode_values(codec, buffer, k, scale, back),
        },
        repeats=repeats,
    )
    return {
        "value_codec": codec.name,
        "value_bits": 8 * written / k,
        "relative_error": float(error.double().norm() / values.double().norm()),
        "encode_ns": timings["encode"].seconds / k * 1e9,
        "decode_ns": timings["decode"].seconds / k * 1e9,
        "spread": max(t.spread for t in timings.values()),
        "goal": None,
        "ok": "",
    }


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of `run`."""
    columns = {
        "density": ("density", "g"),
        "indices": ("index_codec", ""),
        "values": ("value_codec", ""),
        "index bits": ("index_bits", ".3f"),
        "value bits": ("value_bits", ".3f"),
        "entropy": ("entropy_bits", ".3f"),
        "ratio": ("ratio", ".3f"),
        "estimated": ("estimate_ratio", ".3f"),
        "rel. error": ("relative_error", ".2e"),
        "encode ns": ("encode_ns", ".2f"),
        "decode ns": ("decode_ns", ".2f"),
        "goal": ("goal", "g"),
        "verdict": ("ok", ""),
    }
    rows = result["rows"]
    numel = rows[0]["numel"] if rows else 0
    path = result["meta"]["kernel_path"]
    (console or Console()).print(table(f"codecs, n = {numel:,}, one thread, path {path}", rows, columns))
