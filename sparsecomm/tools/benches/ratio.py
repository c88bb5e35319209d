"""`bench ratio`: compression ratio and error of every codec on gradients of real training, including headers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsecomm import kernels
from sparsecomm.errors import ConfigError
from sparsecomm.exchange import blank_header
from sparsecomm.exchange.methods.allgather import Allgather
from sparsecomm.tools.benches import Timing, alternate, bench, figures, meta, table, verdict
from sparsecomm.tools.benches.recordings import SOURCES, Recording, missing, record
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import (
    HEADER_BYTES,
    choose_index_codec,
    decode_body,
    encode_payload,
    max_payload_bytes,
    read_header,
)

__all__ = ["Coded", "code", "plots", "print_table", "run"]

_DRAWS = 5  # random selections that `delta_random` averages
_FLOOR = "floor"


@bench(
    "ratio",
    keys=("model", "density", "value_codec", "index_codec"),
    measures=("payload_bytes", "relative_error", "encode_floor_ratio", "decode_floor_ratio"),
)
def run(
    models: Sequence[str] | None = None,
    densities: Sequence[float] = (0.001, 0.01, 0.1),
    steps: int = 80,
    repeats: int = 5,
) -> dict[str, Any]:
    """Encodes gradients recorded from real training with every value and index codec, and compares size and error.

    Two workers train each model at each density with error feedback. The vectors that worker 0 compresses are recorded
    after 1/8, 1/2 and all of the steps. Goal: top-k with rounding contracts by at least k / n, the mean of random-k.

    Args:
        models: Models to train: gpt, text-cnn (both on source code of Python's standard library) or digits-cnn (needs
            scikit-learn). By default all that can be trained here.
        densities: Nonzeros over elements.
        steps: Training steps before the last recording.
        repeats: Timed rounds.

    Returns:
        ``{"meta": {...}, "rows": [...]}``. meta.recordings describes each training and its loss, meta.left_out the
        models that could not be trained. A row has model, numel, density, nnz, value_codec, index_codec, chosen
        (whether sparsecomm would choose this index codec); as means over the recordings payload_bytes (header
        included), index_bytes, value_bytes, ratio_fp32 (4n over payload), ratio_fp16 (2n over payload), ratio_coo32 (8k
        over payload), bits_an_element, bits_a_nonzero, relative_error and delta (contraction,
        1 - |x - C(x)|^2 / |x|^2); delta_worst (minimum of delta), delta_bound (k / n), delta_random (delta of
        random-k), encode_floor_ratio and decode_floor_ratio (times over that of ``residual.add_(grad)``), spread, goal
        and ok.

    Raises:
        ConfigError: An argument is not acceptable, or a model's data is not installed.
    """
    chosen, left_out = _checked(models, densities, steps, repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, made = [], []
    try:
        info = meta()
        moments = sorted({max(1, steps // 8), max(1, steps // 2), steps})
        for name in chosen:
            for density in densities:
                recording = record(SOURCES[name], density, steps, moments)
                made.append(_about(recording))
                rows += _rows(recording, repeats)
    finally:
        torch.set_num_threads(threads)
    return {"meta": info | {"recordings": made, "left_out": left_out}, "rows": rows}


def _checked(
    models: Sequence[str] | None, densities: Sequence[float], steps: int, repeats: int
) -> tuple[list[str], dict[str, str]]:
    """Returns the models to train, and the reasons why others cannot be trained, by model."""
    for name in models or ():
        if name not in SOURCES:
            raise ConfigError(f"model {name!r} does not exist; known are {', '.join(SOURCES)}")
        if missing(SOURCES[name]):
            raise ConfigError(f"model {name!r} cannot be trained: {missing(SOURCES[name])}")
    for density in densities:
        if not 0 < density <= 1:
            raise ConfigError(f"density = {density} is not in (0, 1]")
    for option, value in (("steps", steps), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{option} = {value} is not a positive number")
    left_out = {} if models else {name: missing(source) for name, source in SOURCES.items() if missing(source)}
    return [name for name in models or SOURCES if name not in left_out], left_out


def _about(recording: Recording) -> dict[str, Any]:
    return {
        "model": recording.source,
        "data": SOURCES[recording.source].data,
        "parameters": recording.accumulated[0].numel(),
        "density": recording.density,
        "steps": list(recording.steps),
        "loss_at_start": recording.losses[0],
        "loss_at_end": recording.losses[1],
    }


@dataclass(frozen=True, slots=True)
class Coded:
    """A vector that was encoded and decoded.

    Attributes:
        payload: Header, indices and values, uint8.
        index_bytes: Bytes of the indices in the payload.
        value_bytes: Bytes of the values in the payload.
        relative_error: Error of the whole vector from selection and rounding, |x - C(x)| / |x|.
        encode: Writes the payload again, for timing.
        decode: Reads and checks the payload again, for timing.
    """

    payload: torch.Tensor
    index_bytes: int
    value_bytes: int
    relative_error: float
    encode: Callable[[], None]
    decode: Callable[[], None]

    @property
    def delta(self) -> float:
        """The contraction, 1 - |x - C(x)|^2 / |x|^2."""
        return 1.0 - self.relative_error**2


def code(
    x: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, value_codec: ValueCodec, index_codec: IndexCodec
) -> Coded:
    """Encodes selected elements of a vector as a payload and decodes it.

    Args:
        x: The whole vector, float32, shape (n,).
        indices: Indices of the selected elements, uint32, shape (k,), ascending.
        values: Values of the selected elements, float32, shape (k,).
        value_codec: Codec of the values.
        index_codec: Codec of the indices.
    """
    n, k = x.numel(), values.numel()
    header = blank_header(0, 1, 0, 0, n, Allgather.number)
    header.value_codec, header.index_codec = value_codec, index_codec
    room = torch.empty(max_payload_bytes(index_codec, value_codec, k, n), dtype=torch.uint8)
    error, got_indices, got_values = (
        torch.empty(k, dtype=torch.float32),
        torch.empty_like(indices),
        torch.empty(k, dtype=torch.float32),
    )

    def encode() -> None:
        encode_payload(header, indices, values, room, error)

    def decode() -> None:
        found = read_header(room)
        decode_body(found, room[HEADER_BYTES : HEADER_BYTES + found.body_bytes], got_indices, got_values)

    encode()
    decode()
    lost = x.double()
    lost[got_indices.long()] -= got_values.double()
    norm = float(x.double().norm())
    relative = float(lost.norm()) / norm if norm else 0.0
    payload = room[: HEADER_BYTES + header.body_bytes]
    return Coded(payload, header.index_bytes, header.value_bytes, relative, encode, decode)


def _rows(recording: Recording, repeats: int) -> list[dict[str, Any]]:
    n = recording.accumulated[0].numel()
    k = max(1, round(recording.density * n))
    selections = [(x, *_top(x, k)) for x in recording.accumulated]
    whole = all(values.numel() == n for _, _, values in selections)
    pairs = [(v, i) for v in ValueCodec for i in IndexCodec if whole or i != IndexCodec.DENSE]
    coded = {pair: [code(*selection, *pair) for selection in selections] for pair in pairs}
    timings = _timed({pair: each[-1] for pair, each in coded.items()}, n, repeats)
    common = {
        "model": recording.source,
        "numel": n,
        "density": recording.density,
        "nnz": statistics.fmean(values.numel() for _, _, values in selections),
        "delta_bound": k / n,
        "delta_random": statistics.fmean(_random_k(x, k) for x in recording.accumulated),
    }
    picked = choose_index_codec(selections[-1][2].numel(), n)
    return [common | _row(pair, each, common, pair[1] == picked, timings) for pair, each in coded.items()]


def _top(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the k largest elements as in training, or fewer if x has fewer nonzeros."""
    indices, values = torch.empty(k, dtype=torch.uint32), torch.empty(k, dtype=torch.float32)
    stored = kernels.exact_topk(None, x.clone(), k, indices, values).stored
    return indices[:stored], values[:stored]


def _row(
    pair: tuple[ValueCodec, IndexCodec],
    coded: Sequence[Coded],
    common: dict[str, Any],
    chosen: bool,
    timings: dict[tuple[object, ...], Timing],
) -> dict[str, Any]:
    n, nnz = common["numel"], common["nnz"]
    size = statistics.fmean(c.payload.numel() for c in coded)
    encoding, decoding, floor = timings[("encode", *pair)], timings[("decode", *pair)], timings[(_FLOOR,)]
    worst = min(c.delta for c in coded)
    return {
        "value_codec": pair[0].name,
        "index_codec": pair[1].name,
        "chosen": chosen,
        "payload_bytes": size,
        "index_bytes": statistics.fmean(c.index_bytes for c in coded),
        "value_bytes": statistics.fmean(c.value_bytes for c in coded),
        "ratio_fp32": 4 * n / size,
        "ratio_fp16": 2 * n / size,
        "ratio_coo32": 8 * nnz / size,
        "bits_an_element": 8 * size / n,
        "bits_a_nonzero": 8 * size / nnz if nnz else None,
        "relative_error": statistics.fmean(c.relative_error for c in coded),
        "delta": statistics.fmean(c.delta for c in coded),
        "delta_worst": worst,
        "encode_floor_ratio": encoding.over(floor),
        "decode_floor_ratio": decoding.over(floor),
        "spread": max(encoding.spread, decoding.spread),
        "goal": common["delta_bound"],
        "ok": verdict(common["delta_bound"], worst),
    }


def _timed(
    coded: dict[tuple[ValueCodec, IndexCodec], Coded], numel: int, repeats: int
) -> dict[tuple[object, ...], Timing]:
    residual, grad = torch.zeros(numel, dtype=torch.float32), torch.ones(numel, dtype=torch.float32)
    tasks: dict[tuple[object, ...], Callable[[], object]] = {(_FLOOR,): lambda: residual.add_(grad)}
    for pair, one in coded.items():
        tasks[("encode", *pair)] = one.encode
        tasks[("decode", *pair)] = one.decode
    return alternate(tasks, repeats=repeats, warmup=2)


def _random_k(x: torch.Tensor, k: int) -> float:
    """Returns the contraction when k random elements are kept, as the mean of a few draws."""
    generator = torch.Generator().manual_seed(0)
    whole = float(x.double().square().sum())
    if not whole:
        return 1.0
    draws = (torch.randperm(x.numel(), generator=generator)[:k] for _ in range(_DRAWS))
    return statistics.fmean(float(x[draw].double().square().sum()) / whole for draw in draws)


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of `run`: a table for each model and a description of its training."""
    columns = {
        "density": ("density", "g"),
        "values": ("value_codec", ""),
        "indices": ("indices", ""),
        "bytes": ("payload_bytes", ",.0f"),
        "x fp32": ("ratio_fp32", ".1f"),
        "x fp16": ("ratio_fp16", ".1f"),
        "x COO32": ("ratio_coo32", ".2f"),
        "bits/element": ("bits_an_element", ".3f"),
        "bits/nonzero": ("bits_a_nonzero", ".2f"),
        "rel. error": ("relative_error", ".4f"),
        "delta": ("delta", ".4f"),
        "k/n": ("delta_bound", ".4f"),
        "random-k": ("delta_random", ".4f"),
        "encode": ("encode_floor_ratio", ".3f"),
        "decode": ("decode_floor_ratio", ".3f"),
        "verdict": ("ok", ""),
    }
    out = console or Console()
    rows = [row | {"indices": row["index_codec"] + (" *" if row["chosen"] else "")} for row in result["rows"]]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        title = f"{model}, n = {mine[0]['numel']:,}; * chosen by default; encode and decode over residual.add_(grad)"
        out.print(table(title, mine, columns))
    for made in result["meta"]["recordings"]:
        out.print(
            f"{made['model']} ({made['data']}), {made['parameters']:,} parameters, error feedback at density "
            f"{made['density']:g}, recorded at steps {', '.join(map(str, made['steps']))}, loss "
            f"{made['loss_at_start']:.3f} at the start and {made['loss_at_end']:.3f} at the end",
            highlight=False,
        )
    for model, reason in result["meta"]["left_out"].items():
        out.print(f"left out: {model}, {reason}", highlight=False)


def plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws compression ratio against relative error, with a panel per model; returns the files written."""
    rows = result["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    densities = sorted({row["density"] for row in rows})
    codecs = list(dict.fromkeys(row["value_codec"] for row in rows))
    figure, axes = figures.new_figure(1, len(models), sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for density, colour in zip(densities, figures.COLOURS, strict=False):
            for codec, marker in zip(codecs, figures.MARKERS, strict=False):
                dots = [r for r in mine if (r["density"], r["value_codec"]) == (density, codec)]
                style = {"color": colour, "marker": marker, "linestyle": "none"}
                packed = [r for r in dots if r["chosen"]]
                plain = [r for r in dots if r["index_codec"] == IndexCodec.RAW.name]
                for some, fill in ((packed, colour), (plain, "none")):
                    x, y = [r["relative_error"] for r in some], [r["ratio_fp32"] for r in some]
                    axis.plot(x, y, **style, markerfacecolor=fill, markersize=7)
        axis.set(yscale="log", title=f"{model}, n = {mine[0]['numel']:,}", xlabel="relative error |x - C(x)| / |x|")
        axis.axhline(1.0, color="black", linewidth=1)
        figures.ratio_axis(axis.yaxis)
    first = axes[0, 0]
    first.set_ylabel("fp32 bytes / payload bytes")
    for density, colour in zip(densities, figures.COLOURS, strict=False):
        first.plot([], [], "s", color=colour, label=f"density {density:g}")
    for codec, marker in zip(codecs, figures.MARKERS, strict=False):
        first.plot([], [], marker, color="grey", label=f"{codec.lower()} values")
    first.plot([], [], "o", color="grey", label="packed indices, as by default")
    first.plot([], [], "o", color="grey", markerfacecolor="none", label="indices as uint32")
    figures.legend_below(figure, axes, columns=5)
    figures.headline(figure, result["meta"], "ratio against error on gradients of real training")
    return figures.save(figure, folder, "ratio_against_error")
