"""`bench gpu_hook`: time that the hook adds to a training step on a GPU in a world of one, thus without a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc
from sparsecomm.tools.benches import bench, gpu, meta, table, verdict
from sparsecomm.tools.benches.methods import silent_hook

__all__ = ["print_table", "run"]

_WIDTH, _DEPTH = 2048, 6  # 25.2M parameters, about ResNet-50's


@bench("gpu_hook", keys=("density", "batch", "numel"), measures=("share",))
def run(
    densities: Sequence[float] = (0.001, 0.01),
    batch: int = 4096,
    steps: int = 30,
    device: str = "cuda",
    width: int = _WIDTH,
) -> dict[str, Any]:
    """Times training steps of an MLP of 25.2M parameters with the hook and with an empty hook.

    Goal: the hook adds at most 5% of the time of backward. The world has one rank, which encodes, decodes and applies
    its own payload without sending anything.

    Args:
        densities: Nonzeros over elements.
        batch: Examples per step; more of them make backward longer.
        steps: Timed steps with each hook.
        device: Device to measure on; with cpu the bench runs but has no verdict.
        width: Width of the layers.

    Returns:
        ``{"meta": {...}, "rows": [...]}``. A row has density, batch, numel, ranks, step_seconds, floor_seconds (with
        an empty hook), backward_seconds, share (time that the hook adds over time of backward), goal and ok.

    Raises:
        ConfigError: This machine cannot measure on that device.
    """
    where = torch.device("cpu") if device == "cpu" else gpu.check_device(device)
    world = sc.init()
    rows = []
    for density in densities:
        state = sc.SparseState(sc.ThresholdTopK(density), collective="allgather")
        ours, backward = _seconds(where, width, batch, steps, state, sc.sparse_hook)
        floor, _ = _seconds(where, width, batch, steps, None, silent_hook)
        share = (ours - floor) / backward
        rows.append(
            {
                "density": density,
                "batch": batch,
                "numel": sum(report.numel for report in state.buckets().values()),
                "ranks": world.size,
                "step_seconds": ours,
                "floor_seconds": floor,
                "backward_seconds": backward,
                "share": share,
                "goal": 0.05,
                "ok": verdict(share, 0.05) if device != "cpu" else "",
            }
        )
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    return {"meta": meta() | {"gpu": name}, "rows": rows}


def _seconds(
    device: torch.device, width: int, batch: int, steps: int, state: object, hook: Callable[..., object]
) -> tuple[float, float]:
    """Returns the median seconds of a step (forward and backward) and of its backward alone."""
    torch.manual_seed(0)
    layers = [layer for _ in range(_DEPTH) for layer in (nn.Linear(width, width, dtype=torch.float32), nn.Tanh())]
    ddp = DistributedDataParallel(nn.Sequential(*layers).to(device), process_group=dist.new_group(backend="gloo"))
    ddp.register_comm_hook(state, hook)
    x = torch.randn(batch, width, device=device, dtype=torch.float32)
    whole, backward = [], []
    for step in range(-5, steps):
        ddp.zero_grad()
        gpu.wait(device)
        start = time.perf_counter()
        loss = ddp(x).square().mean()
        gpu.wait(device)
        half = time.perf_counter()
        loss.backward()
        gpu.wait(device)
        end = time.perf_counter()
        if step >= 0:
            whole.append(end - start)
            backward.append(end - half)
    return statistics.median(whole), statistics.median(backward)


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of `run`."""
    columns = {
        "density": ("density", "g"),
        "step ms": ("step_ms", ".3f"),
        "without ms": ("floor_ms", ".3f"),
        "backward ms": ("backward_ms", ".3f"),
        "added / backward": ("share", ".1%"),
        "verdict": ("ok", ""),
    }
    rows = [
        row | {f"{k}_ms": row[f"{k}_seconds"] * 1e3 for k in ("step", "floor", "backward")} for row in result["rows"]
    ]
    (console or Console()).print(
        table(f"time that the hook adds in a world of one, {result['meta']['gpu']}", rows, columns)
    )
