"""The GPU rows of `bench kernels`: speed of the Triton kernels, relative to device memory's copy bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsecomm import kernels
from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import Timing, timing, verdict
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["GPU_NUMEL", "check_device", "measure", "wait"]

GPU_NUMEL = 2**28
"""256M elements, 1 GiB in float32, which is far larger than any cache."""

_MOVED = 12  # bytes per element: read gradient and residual, write the residual
_COPIED = 8  # bytes per element: read and write
_DRAGONN = 2**27  # elements (512 MB); DRAGONN takes 13.2 ms for them on a V100
_PAYLOADS = 8
_HEAD = 88  # bytes of a payload's header
_INDEX, _VALUE = IndexCodec.RICE, ValueCodec.FP16


def check_device(device: str) -> torch.device:
    """Returns the CUDA device to measure on.

    Raises:
        ConfigError: Kernels cannot run there, for the reason in the message.
    """
    chosen = torch.device(device)
    if chosen.type != "cuda":
        raise ConfigError(f"device must be cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ConfigError(f"device = {device!r} cannot be measured here: {build}")
    problem = kernels.triton_problem()
    if problem is not None:
        raise ConfigError(f"device = {device!r} cannot be measured here: {problem}: pip install 'sparsecomm[gpu]'")
    return chosen


def measure(device: torch.device, numel: int, densities: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """Returns the rows of `sparsecomm bench kernels --device cuda`.

    Args:
        device: Device to measure on. It may be the CPU under Triton's interpreter, whose times mean nothing.
        numel: Elements of the dense vector.
        densities: Nonzeros over elements.
        repeats: Timed rounds.
    """
    rows: list[dict[str, Any]] = []
    for density in densities:
        rows += [{"density": density, "numel": numel} | row for row in _at(device, numel, density, repeats)]
    few = min(numel, _DRAGONN)
    rows.append({"density": 0.001, "numel": few} | _encoding(device, few, 0.001, repeats))
    for row in rows:
        row |= {"path": "triton", "ok": verdict(row["measured"], row.setdefault("goal", None))}
    return rows


def _times(
    device: torch.device,
    tasks: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times tasks in turn, from idle device to idle device; launches and reading counts back are included."""
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(-2, repeats):
        for name, task in tasks.items():
            if before is not None:
                before()
            wait(device)
            start = time.perf_counter()
            task()
            wait(device)
            if round_ >= 0:
                samples[name].append(time.perf_counter() - start)
    return {name: timing(taken) for name, taken in samples.items()}


def wait(device: torch.device) -> None:
    """Waits until a device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(op: str, took: Timing, metric: str, measured: float, goal: float | None = None) -> dict[str, Any]:
    return {
        "op": op,
        "seconds": took.seconds,
        "spread": took.spread,
        "metric": metric,
        "measured": measured,
        "goal": goal,
    }


def _pairs(device: torch.device, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns a gradient, a residual, and buffers for the indices and values of pairs."""
    grad = torch.randn(n, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float32)
    room = k + k // 4 + 64
    indices = torch.empty(room, dtype=torch.uint32, device=device)
    return grad, torch.zeros_like(grad), indices, torch.empty(room, device=device, dtype=torch.float32)


def _at(device: torch.device, n: int, density: float, repeats: int) -> list[dict[str, Any]]:
    """Returns the rows of one density: selection, and encode, decode and apply together."""
    k = max(1, round(n * density))
    grad, residual, indices, values = _pairs(device, n, k)
    threshold = kernels.exact_topk(grad, residual, k, indices, values).threshold
    other = torch.empty_like(grad)
    took = _times(
        device,
        {
            "copy": lambda: other.copy_(grad),
            "select": lambda: kernels.accumulate_select(grad, residual, threshold, indices, values),
            "topk": lambda: kernels.exact_topk(grad, residual, k, indices, values),
            "torch": lambda: residual.abs().topk(k, sorted=False),
        },
        repeats,
        residual.zero_,
    )
    copied, select, topk = took["copy"], took["select"], took["topk"]
    moved = select.over(copied) * _COPIED / _MOVED
    rows = [
        _row("copy", copied, "GB/s", _COPIED * n / copied.seconds / 1e9),
        _row("accumulate_select", select, "x copy", moved, 1 / 0.8),
        _row("exact_topk", topk, "x select", topk.over(select), 3.5),
        _row("exact_topk", topk, "x torch", topk.over(took["torch"]), 0.1),
    ]
    rest = _times(device, {"rest": _rest(grad, residual, indices[:k], values[:k])}, repeats)["rest"]
    share = rest.seconds / select.seconds
    rows.append(_row("encode + decode + apply", rest, "x select", share, 0.25 if density <= 0.001 else None))
    return rows


@dataclass(slots=True)
class _PairsHeader:
    """The header fields that decoding a payload needs."""

    rank: int
    nnz: int
    numel: int
    index_bytes: int
    value_scale: float
    bucket: int = 0
    body_bytes: int = 0
    body_crc: int = 0
    index_codec: IndexCodec = _INDEX
    value_codec: ValueCodec = _VALUE


def _rest(grad: torch.Tensor, out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
    """Returns a call that encodes a selection, and decodes and adds the payloads of 8 ranks.

    Payloads are written to and read from pinned memory, as in an exchange. The call leaves out headers, checksums and
    messages, and the initial fill of `out`, which an exchange overwrites.
    """
    n, k, device = grad.numel(), indices.numel(), grad.device
    kernels.exact_topk(None, grad.clone(), k, indices, values)
    room = _HEAD + kernels.max_index_bytes(_INDEX, k, n) + kernels.max_value_bytes(_VALUE, k)
    payload = torch.empty(room, dtype=torch.uint8, pin_memory=device.type == "cuda")
    arrived = torch.empty(_PAYLOADS * room, dtype=torch.uint8, pin_memory=device.type == "cuda")
    error, form = torch.empty_like(values), _PairsHeader(0, k, n, 0, 1.0)
    got_indices = torch.empty(_PAYLOADS * k, dtype=torch.uint32, device=device)
    got_values = torch.empty(_PAYLOADS * k, device=device, dtype=torch.float32)

    def encode() -> tuple[int, int, float, int]:
        return kernels.encode_pairs(form, indices, values, payload, error, head=_HEAD)

    index_bytes, value_bytes, scale, _ = encode()
    size = index_bytes + value_bytes
    bodies = [arrived[r * size : (r + 1) * size].copy_(payload[_HEAD : _HEAD + size]) for r in range(_PAYLOADS)]
    headers = [_PairsHeader(r, k, n, index_bytes, scale) for r in range(_PAYLOADS)]

    def call() -> None:
        encode()
        for part in kernels.decode_pairs(headers, bodies, got_indices, got_values):
            kernels.scatter_add(out, *part)

    return call


def _encoding(device: torch.device, n: int, density: float, repeats: int) -> dict[str, Any]:
    """Returns the row of selecting by threshold and encoding, as in most steps of `ThresholdTopK`."""
    k = max(1, round(n * density))
    grad, residual, indices, values = _pairs(device, n, k)
    threshold = kernels.exact_topk(grad, residual, k, indices, values).threshold
    room = indices.numel()
    most = _HEAD + kernels.max_index_bytes(_INDEX, room, n) + kernels.max_value_bytes(_VALUE, room)
    payload, form = (
        torch.empty(most, dtype=torch.uint8, pin_memory=device.type == "cuda"),
        _PairsHeader(0, k, n, 0, 1.0),
    )

    def encode() -> None:
        k = kernels.accumulate_select(grad, residual, threshold, indices, values).stored
        kernels.encode_pairs(form, indices[:k], values[:k], payload, values[:k], head=_HEAD)

    took = _times(device, {"encode": encode}, repeats, residual.zero_)["encode"]
    return _row("select + encode", took, "ms", took.seconds * 1e3, 1.0 if n == _DRAGONN else None)
