"""One training run by one method, timed; and the worker that runs several in turn on every rank.

``mpirun -n 4 python -m sparsecomm.tools.benches.training --runs ddp-gloo,sparsecomm-topk@0.01`` prints one JSON line
a run on rank 0 when it is done. A run that fails alike on all ranks is a line with its error and the next one follows.
One that fails on some ranks, or hangs, ends the job, since the other ranks are still inside its messages.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist

import sparsecomm as sc
from sparsecomm.errors import ConfigError, SparseCommError
from sparsecomm.tools.benches.methods import METHODS, Attached, Run, load_plugins
from sparsecomm.tools.benches.tasks import TASKS, Task, task

__all__ = ["FEWEST_STEPS", "RunFailed", "Schedule", "agreed", "error_row", "train"]

FEWEST_STEPS = 4
_PATIENCE = 20.0  # seconds at most that a rank which failed waits to hear whether the others failed as well


class RunFailed(SparseCommError):
    """A run failed alike on all ranks; the next one may follow."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a run is and what it writes down.

    Attributes:
        steps: of training, the same for all methods; those of a method's warm-up are not timed.
        eval_every: steps between losses on held-out examples; 0 for one at the end alone.
        lr: learning rate; the task's if None.
        seed: of the model and the examples.
        limit: seconds after which a run counts as hung.

    Raises:
        ConfigError: if there are too few steps to time one.
    """

    steps: int = 20
    eval_every: int = 0
    lr: float | None = None
    seed: int = 0
    limit: float = 300.0

    def __post_init__(self) -> None:
        if self.steps < FEWEST_STEPS:
            raise ConfigError(f"steps = {self.steps}: {FEWEST_STEPS} at least, since a warm-up takes up to 3")


def error_row(run: Run, world: int, error: str | None) -> dict[str, Any]:
    """Returns the row of a run that has no figures."""
    return {"method": run.method, "density": run.density, "world": world, "error": error}


def agreed(world: sc.World, run: Run, chosen: Task, schedule: Schedule) -> dict[str, Any]:
    """Runs `train`, and sees to it that all ranks go on alike. Collective.

    Returns:
        Its row, or one with an error if it failed on all ranks.

    Raises:
        Exception: what went wrong, if it did so on some ranks alone.
    """
    missing = METHODS[run.method].missing
    if missing is not None:
        return error_row(run, world.size, missing)
    # Its own connections: a run that failed may have left half a message on those of the default group.
    patience = timedelta(seconds=min(_PATIENCE, schedule.limit / 8))
    group = dist.new_group(timeout=patience, backend="gloo") if world.size > 1 else None
    faulthandler.dump_traceback_later(schedule.limit, exit=True)
    try:
        row, error = train(world, run, chosen, schedule), None
    except Exception as caught:
        row, error = {}, caught
    try:
        failed = _gathered(error is not None, world.size, group)
    except RuntimeError:
        failed = [True, False]  # some are not there
    finally:
        faulthandler.cancel_dump_traceback_later()
    if error is not None and not all(failed):
        raise error
    if error is not None:
        return error_row(run, world.size, f"{type(error).__name__}: {_first_line(error)}")
    if any(failed):
        raise RunFailed(f"{run} failed on rank {failed.index(True)}, not on rank {world.rank}")
    if group is not None:
        dist.destroy_process_group(group)
    return row


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message").strip()


def _gathered(value: Any, size: int, group: Any = None) -> list[Any]:
    """Returns the value of every rank. Collective."""
    values = [None] * size
    if size == 1:
        return [value]
    dist.all_gather_object(values, value, group=group)
    return values


def train(world: sc.World, run: Run, chosen: Task, schedule: Schedule) -> dict[str, Any]:
    """Trains a fresh model by one method. Collective.

    A method that is still finding out what to do when it should be timed gets as many steps more as that takes.

    Args:
        world: this job.
        run: method and density.
        chosen: model and examples.
        schedule: how long.

    Returns:
        A row, the same on all ranks: method, density, task, world, numel, steps, timed_steps, step_seconds (the median
        step of the slowest rank, without barriers), step_spread (its quartile distance over its median), cpu_seconds
        (of a step, all threads of a rank, the mean over ranks: what communication takes from backward where it is
        hidden shows here), bytes_per_step (sent by the rank that sends most), bytes_are ("counted" as they are sent, or
        "computed" from what the algorithm sends), wire_bytes_per_step (what the network interface sent, all protocols
        included; None where the ranks share it), final_loss (on held-out examples, the mean over ranks), curve (a list
        of [step, seconds, bytes, loss], everything since the start, warm-up included), error (None).
    """
    entry = METHODS[run.method]
    torch.manual_seed(schedule.seed)
    model = chosen.build()
    numel = sum(p.numel() for p in model.parameters())
    attached = entry.attach(model, run.density or 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=schedule.lr or chosen.lr, momentum=attached.momentum)
    held_out = chosen.held_out_examples(schedule.seed)
    seconds, sent, curve = [], [], []
    cpu: list[float] = []
    wire_start = wire_end = None
    step, first = 0, entry.warmup  # the first step that is timed
    while step < schedule.steps or step - first < schedule.steps - entry.warmup:
        if not attached.settled():
            first = max(entry.warmup, step + 1)
        if step == first:
            wire_start = _interface_bytes()
        examples = chosen.examples(schedule.seed, world.rank, step)
        used = process_time()
        seconds.append(_step(attached, optimizer, chosen, examples))
        cpu.append(process_time() - used)
        sent.append(attached.step_bytes(step))
        wire_end = _interface_bytes()
        last = step == schedule.steps - 1
        if last or (schedule.eval_every and step < schedule.steps and (step + 1) % schedule.eval_every == 0):
            curve.append([step + 1, sum(seconds), sum(sent), _loss(model, chosen, held_out)])
            if world.size > 1:
                world.barrier()  # the evaluation is not part of anybody's step
        step += 1
    timed = seconds[first:]
    own_wire = None if wire_start is None or wire_end is None else (wire_end - wire_start) / len(timed)
    median = statistics.median(timed)
    spread = _quartile_distance(timed) / median
    work = statistics.mean(cpu[first:])
    mine = (median, spread, statistics.mean(sent[first:]), own_wire, [point[3] for point in curve], work)
    ranks = _gathered(mine, world.size)
    slowest = max(ranks, key=lambda rank: float(rank[0]))
    for i, point in enumerate(curve):
        point[3] = statistics.mean(rank[4][i] for rank in ranks)
    wires = [rank[3] for rank in ranks if rank[3] is not None]
    return {
        "method": run.method,
        "density": run.density,
        "task": chosen.name,
        "world": world.size,
        "numel": numel,
        "steps": schedule.steps,
        "timed_steps": len(timed),
        "step_seconds": slowest[0],
        "step_spread": slowest[1],
        "cpu_seconds": statistics.mean(rank[5] for rank in ranks),
        "bytes_per_step": round(max(rank[2] for rank in ranks)),
        "bytes_are": "counted" if attached.counted else "computed",
        "wire_bytes_per_step": round(max(wires)) if len(wires) == world.size else None,
        "final_loss": curve[-1][3],
        "curve": curve,
        "error": None,
    }


def _step(
    attached: Attached, optimizer: torch.optim.Optimizer, chosen: Task, examples: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Does one step of training; returns its seconds."""
    start = perf_counter()
    optimizer.zero_grad(set_to_none=True)
    chosen.loss(attached.model, *examples).backward()  # type: ignore[no-untyped-call]
    if attached.average is not None:
        attached.average()
    optimizer.step()
    return perf_counter() - start


@torch.no_grad()
def _loss(model: torch.nn.Module, chosen: Task, examples: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float(chosen.loss(model, *examples))


def _quartile_distance(samples: Sequence[float]) -> float:
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def _interface_bytes() -> int | None:
    """Returns the bytes sent by the interface that GLOO_SOCKET_IFNAME names, where this host has one rank."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    if name is None or sc.world().local_size > 1:
        return None
    with suppress(OSError):
        for line in Path("/proc/self/net/dev").read_text().splitlines():
            label, _, numbers = line.partition(":")
            if label.strip() == name:
                return int(numbers.split()[8])
    return None


def _worker(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparsecomm.tools.benches.training", description=__doc__)
    parser.add_argument("--runs", required=True, help="methods, METHOD or METHOD@DENSITY, separated by commas")
    parser.add_argument("--task", default="mlp", choices=sorted(TASKS))
    parser.add_argument("--plugins", default="", help="modules that register methods, separated by commas")
    for name in ("steps", "eval-every", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Schedule(), name.replace("-", "_")))
    parser.add_argument("--lr", type=float)
    parser.add_argument("--limit", type=float, default=Schedule().limit)
    given = parser.parse_args(arguments)
    load_plugins([name for name in given.plugins.split(",") if name])
    torch.set_num_threads(1)
    world = sc.init(timeout=given.limit)
    schedule = Schedule(given.steps, given.eval_every, given.lr, given.seed, given.limit)
    for text in given.runs.split(","):
        row = agreed(world, Run.parse(text), task(given.task), schedule)
        if world.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    _worker(sys.argv[1:])
