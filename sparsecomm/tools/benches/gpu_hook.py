"""What the hook adds to a training step on a GPU, in a world of one: everything but the network."""

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
    """Times forward and backward of an MLP of 25.2M parameters with the hook and with one that does nothing.

    Goal: what the hook adds is at most 5% of backward. The world has one rank, so its own payload is encoded, decoded
    and applied, and nothing travels.

    Args:
        densities: nonzeros over elements.
        batch: rows of the input; more of them make backward longer.
        steps: timed steps of each.
        device: cuda; cpu only shows that the bench runs.
        width: of the layers.

    Returns:
        ``{"meta": {...}, "rows": [...]}``; each row has density, numel, step_seconds, floor_seconds, backward_seconds,
        share (what the hook adds over backward), goal, ok.

    Raises:
        ConfigError: for a device that cannot be measured here.
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
    """Median seconds of a step, forward and backward, and of its backward alone."""
    torch.manual_seed(0)
    layers = [layer for _ in range(_DEPTH) for layer in (nn.Linear(width, width), nn.Tanh())]
    ddp = DistributedDataParallel(nn.Sequential(*layers).to(device), process_group=dist.new_group(backend="gloo"))
    ddp.register_comm_hook(state, hook)
    x = torch.randn(batch, width, device=device)
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
    (console or Console()).print(table(f"what the hook adds, a world of one, {result['meta']['gpu']}", rows, columns))
