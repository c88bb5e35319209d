"""A timed training run with one method, and the worker that does several runs in turn on every rank.

``mpirun -n 4 python -m sparsecomm.tools.benches.training --runs ddp-gloo,sparsecomm-topk@0.01`` prints one JSON line
per run on rank 0. If a run fails on all ranks, its line holds the error and the next run follows. If it hangs or fails
on some ranks only, the job ends, because the other ranks are still exchanging messages of that run.
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
from dataclasses import dataclass, field
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

__all__ = ["FEWEST_STEPS", "RunFailed", "Schedule", "agreed", "error_row", "timed_step", "train"]

FEWEST_STEPS = 4
_PATIENCE = 20.0  # longest time in seconds that a failed rank waits to learn whether the others failed as well


class RunFailed(SparseCommError):
    """A run failed on another rank, but not on this one."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length and settings of a run.

    Attributes:
        steps: Training steps, the same for all methods; those of a method's warm-up are not timed.
        eval_every: Steps between losses on held-out examples; 0 evaluates only at the end.
        lr: Learning rate; that of the task if None.
        seed: Seed of the model and the examples.
        limit: Seconds after which a run counts as hung.

    Raises:
        ConfigError: There are too few steps to time one.
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
    """Returns the row of a run without figures."""
    return {"method": run.method, "density": run.density, "world": world, "error": error}


def agreed(world: sc.World, run: Run, chosen: Task, schedule: Schedule) -> dict[str, Any]:
    """Runs `train` and makes all ranks agree on the outcome. Collective.

    Returns:
        The row of `train`, or a row with an error if it failed on all ranks.

    Raises:
        Exception: The failure of this rank, if other ranks did not fail.
        RunFailed: Another rank failed, and this one did not.
    """
    missing = METHODS[run.method].missing
    if missing is not None:
        return error_row(run, world.size, missing)
    # A separate group, because a failed run may have left half a message on the connections of the default group.
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
        failed = [True, False]  # other ranks do not answer, so not all failed
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


@dataclass(slots=True)
class _Record:
    """The measurements of this rank in one run, with an entry per step.

    Attributes:
        first: First step that is timed.
        seconds: Wall time of each step.
        cpu: Processor time of each step, all threads.
        sent: Bytes sent in each step.
        curve: Points [step, seconds, bytes, loss], where seconds and bytes count from the start.
        wire_start: Bytes that the network interface had sent before the first timed step; None if unknown.
        wire_end: Bytes that it had sent after the last step; None if unknown.
    """

    first: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    curve: list[list[Any]] = field(default_factory=list)
    wire_start: int | None = None
    wire_end: int | None = None

    @property
    def timed(self) -> list[float]:
        """Seconds of the timed steps."""
        return self.seconds[self.first :]

    def summary(self) -> tuple[float, float, float, float | None, list[float], float]:
        """Returns median, spread, mean bytes, wire bytes per step, losses of the curve and mean processor time."""
        median = statistics.median(self.timed)
        wire = None
        if self.wire_start is not None and self.wire_end is not None:
            wire = (self.wire_end - self.wire_start) / len(self.timed)
        spread = _quartile_distance(self.timed) / median
        losses = [point[3] for point in self.curve]
        return (
            median,
            spread,
            statistics.mean(self.sent[self.first :]),
            wire,
            losses,
            statistics.mean(self.cpu[self.first :]),
        )


def train(world: sc.World, run: Run, chosen: Task, schedule: Schedule) -> dict[str, Any]:
    """Trains a fresh model with one method. Collective.

    If a method has not settled when timing should start, the run has as many more steps as that takes.

    Args:
        world: The world of this job.
        run: Method and density.
        chosen: Model and examples.
        schedule: Length and settings of the run.

    Returns:
        A row, the same on all ranks: method, density, task, world, numel, steps, timed_steps, step_seconds (median step
        of the slowest rank, without barriers), step_spread (its quartile distance over its median), cpu_seconds (of a
        step, all threads of a rank, mean over ranks; it shows the time that hidden communication takes from backward),
        bytes_per_step (sent by the rank that sends most), bytes_are ("counted" when sent, or "computed" from the
        algorithm), wire_bytes_per_step (sent by the network interface, including all protocols; None if ranks share
        it), final_loss (on held-out examples, mean over ranks), curve (a list of [step, seconds, bytes, loss], where
        seconds and bytes count from the start and include the warm-up), error (None).
    """
    entry = METHODS[run.method]
    torch.manual_seed(schedule.seed)
    model = chosen.build()
    numel = sum(p.numel() for p in model.parameters())
    attached = entry.attach(model, run.density or 1.0)
    record = _record(world, attached, model, entry.warmup, chosen, schedule)
    ranks = _gathered(record.summary(), world.size)
    slowest = max(ranks, key=lambda rank: float(rank[0]))
    for i, point in enumerate(record.curve):
        point[3] = statistics.mean(rank[4][i] for rank in ranks)
    wires = [rank[3] for rank in ranks if rank[3] is not None]
    return {
        "method": run.method,
        "density": run.density,
        "task": chosen.name,
        "world": world.size,
        "numel": numel,
        "steps": schedule.steps,
        "timed_steps": len(record.timed),
        "step_seconds": slowest[0],
        "step_spread": slowest[1],
        "cpu_seconds": statistics.mean(rank[5] for rank in ranks),
        "bytes_per_step": round(max(rank[2] for rank in ranks)),
        "bytes_are": "counted" if attached.counted else "computed",
        "wire_bytes_per_step": round(max(wires)) if len(wires) == world.size else None,
        "final_loss": record.curve[-1][3],
        "curve": record.curve,
        "error": None,
    }


def _record(
    world: sc.World, attached: Attached, model: torch.nn.Module, warmup: int, chosen: Task, schedule: Schedule
) -> _Record:
    """Runs all steps and measures them. Collective."""
    optimizer = torch.optim.SGD(model.parameters(), lr=schedule.lr or chosen.lr, momentum=attached.momentum)
    held_out = chosen.held_out_examples(schedule.seed)
    record = _Record(first=warmup)
    step = 0
    while step < schedule.steps or step - record.first < schedule.steps - warmup:
        if not attached.settled():
            record.first = max(warmup, step + 1)
        if step == record.first:
            record.wire_start = _interface_bytes()
        examples = chosen.examples(schedule.seed, world.rank, step)
        used = process_time()
        record.seconds.append(timed_step(attached, optimizer, chosen, examples))
        record.cpu.append(process_time() - used)
        record.sent.append(attached.step_bytes(step))
        record.wire_end = _interface_bytes()
        last = step == schedule.steps - 1
        if last or (schedule.eval_every and step < schedule.steps and (step + 1) % schedule.eval_every == 0):
            loss = _loss(model, chosen, held_out)
            record.curve.append([step + 1, sum(record.seconds), sum(record.sent), loss])
            if world.size > 1:
                world.barrier()  # so that the evaluation of other ranks is not part of any step
        step += 1
    return record


def timed_step(
    attached: Attached, optimizer: torch.optim.Optimizer, chosen: Task, examples: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Runs one training step and returns its seconds. Collective."""
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
    """Returns the bytes sent by the interface in GLOO_SOCKET_IFNAME; None if it is unknown or ranks share it."""
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
    parser.add_argument("--runs", required=True, help="comma-separated runs, METHOD or METHOD@DENSITY")
    parser.add_argument("--task", default="mlp", choices=sorted(TASKS))
    parser.add_argument("--plugins", default="", help="comma-separated modules that register methods")
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
