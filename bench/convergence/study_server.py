"""Train with a parameter server, with every option of the study: the last ranks serve, the others are workers.

    mpirun -n 5 python bench/convergence/study_server.py --servers 2 --task digits --mode async
    mpirun --with-ft ulfm --mca pml ob1 -n 5 python bench/convergence/study_server.py --servers 2 --kill-worker-at 40

Model, data and options are those of study_digits.py and study_gpt.py. With ``--kill-worker-at`` the last worker kills
itself (SIGKILL) at that step, and the others go on. mpi_examples/param_server.py is the plain form of this script.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import options
import study_digits
import study_gpt
import text_task
import torch
from compression import make_density, make_feedback
from gpt_model import SIZES
from optimizers import DecoupledSGD, rate
from task import Task, draw
from torch import nn

import sparsecomm as sc

FOREIGN = (
    "out",
    "save_every",
    "resume",
    "stop_after",
    "plot",
    "tensorboard",
    "global_batch",
    "skip_early_evals",
)  # options of DDP training


@dataclass(frozen=True, kw_only=True)
class Settings(study_gpt.Settings):
    """The parsed command line; ``--help`` explains each option."""

    task: str
    servers: int
    mode: str
    bound: int
    pull_density: float | None
    kill_worker_at: int | None


def make_mode(settings: Settings) -> sc.ps.Mode:
    """Returns the mode, which says how far workers may run apart."""
    if settings.mode == "ssp":
        return sc.ps.StaleSynchronous(settings.bound)
    return sc.ps.Synchronous() if settings.mode == "sync" else sc.ps.Asynchronous()


def shard_optimizer(settings: Settings) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Returns a function that makes the optimizer of study_gpt.py for the flat pieces of a shard.

    The shapes of the parameters from which the pieces come tell matrices from vectors.
    """
    momentum = 0.0 if settings.updates_before else settings.averaging
    adam = settings.optimizer == "adamw" and settings.feedback != "adam"

    def make(pieces: list[Any]) -> torch.optim.Optimizer:
        matrices = [p for p in pieces if len(p.ps_shape) >= 2]
        vectors = [p for p in pieces if len(p.ps_shape) < 2]
        name = "weight_decay" if adam else "decay"
        groups = [{"params": matrices, name: settings.weight_decay}, {"params": vectors, name: 0.0}]
        groups = [group for group in groups if group["params"]]  # a shard may hold no matrix
        if adam:
            return torch.optim.AdamW(groups, lr=settings.lr, betas=(momentum, options.ADAM_BETA2), fused=True)
        return DecoupledSGD(groups, lr=settings.lr, momentum=momentum, nesterov=settings.nesterov and momentum > 0)

    return make


def make_worker(settings: Settings, model: nn.Module) -> sc.ps.Worker:
    """Returns a worker that compresses as the command line asks."""
    compressor: sc.Compressor = sc.Dense()
    if settings.sparse:
        kind = sc.TopK if settings.compressor == "topk" else sc.ThresholdTopK
        compressor = kind(density=make_density(settings))
    codec = settings.value_codec if settings.sparse else "auto"
    feedback = make_feedback(settings)
    # Clipping changes gradients after backward, so a part that was pushed during backward would be sent twice.
    return sc.ps.Worker(model, compressor, overlap=settings.updates_before, feedback=feedback, value_codec=codec)


def work(settings: Settings, task: Task, rank: int, size: int) -> list[dict[str, Any]]:
    """Trains on one worker and returns the rows of its log."""
    model = task.build()
    worker = make_worker(settings, model)
    limit = float("inf") if settings.updates_before else settings.clip
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for step in range(settings.steps):
        if step == settings.kill_worker_at and rank == size - 1:
            print(f"worker {rank} kills itself at step {step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        model.zero_grad(set_to_none=True)
        loss = model(*draw(task, settings, rank=rank, size=size, step=step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        worker.step()
        done = step + 1
        if rank == 0 and (done % settings.eval_every == 0 or done == settings.steps):
            row = {"step": done, "train_loss": loss.item(), "seconds": time.perf_counter() - began}
            rows.append(row | evaluate(task, model) | report(worker))
            print(describe(rows[-1], size), flush=True)
    return rows


def describe(row: dict[str, Any], size: int) -> str:
    """Returns a row of the log as a line of text."""
    right = "" if row["val_accuracy"] is None else f", {row['val_accuracy']:.1%} right"
    return (
        f"step {row['step']}: loss {row['val_loss']:.3f}{right}, {row['ratio']:.1f}x fewer bytes than dense, "
        f"staleness {row['staleness']:.2f}, {row['workers']} of {size} workers"
    )


@torch.no_grad()
def evaluate(task: Task, model: nn.Module) -> dict[str, float | None]:
    """Returns held-out loss and accuracy of the parameters that were pulled last."""
    measured = [task.measure(model, *batch) for batch in task.held_out()]
    loss = float(torch.stack([m[0] for m in measured]).mean())
    right = [m[1] for m in measured if m[1] is not None]
    return {"val_loss": loss, "val_accuracy": float(torch.stack(right).mean()) if right else None}


def report(worker: sc.ps.Worker) -> dict[str, Any]:
    """Returns the traffic of this worker and the number of living workers."""
    metrics = worker.metrics()
    dead = {w for shard in worker.statistics() for w, why in shard["gone"].items() if why != "ended"}
    return {
        "bytes_sent": metrics.bytes_sent,
        "bytes_received": metrics.bytes_received,
        "ratio": metrics.ratio,
        "staleness": metrics.mean_staleness,
        "versions": worker.versions,
        "workers": worker.size - len(dead),
    }


def parse(arguments: Sequence[str] | None) -> Settings:
    """Parses and checks the command line; exits with status 2 and one message if it is wrong."""
    parser, training = options.make_parser(__doc__ or "", steps=200, batch=16, lr=3e-3)
    training.add_argument("--task", choices=("digits", "gpt"), default="digits", help="(default %(default)s)")
    training.add_argument("--size", choices=tuple(SIZES), default="demo", help="GPT (default %(default)s)")
    text_task.add_options(training)
    serving = parser.add_argument_group("parameter server")
    serving.add_argument("--servers", type=options.positive, default=1, help="ranks that serve (default %(default)s)")
    serving.add_argument("--mode", choices=("sync", "ssp", "async"), default="sync", help="(default %(default)s)")
    serving.add_argument(
        "--bound", type=int, default=3, help="of ssp: pushes ahead of the slowest (default %(default)s)"
    )
    serving.add_argument("--pull-density", type=float, metavar="D", help="share pulled (default: all, dense)")
    serving.add_argument("--kill-worker-at", type=int, metavar="STEP", help="the last worker dies there; needs ULFM")
    settings = options.parse(parser, Settings, arguments)
    default = parser.get_default("collective")
    used = [name for name in FOREIGN if getattr(settings, name)]
    without = settings.compressor in ("none", *options.TORCH_HOOKS)
    if used or settings.collective != default or without:
        names = [*used, *(("collective",) if settings.collective != default else ())]
        names += [f"compressor {settings.compressor}"] if without else []
        parser.error(f"--{names[0].replace('_', '-')} has no meaning with a parameter server")
    return settings


def load(settings: Settings) -> Task:
    """Returns the model with its data; exits with status 2 if the data cannot be read."""
    if settings.task == "gpt":
        return study_gpt.GPTTask(settings, text_task.load(settings))
    try:
        return study_digits.DigitsTask(settings, study_digits.load_digits())
    except ImportError as error:
        options.fail(f"the digits come with scikit-learn: pip install 'sparsecomm[demo]' ({error})")


def write_log(settings: Settings, task: Task, rows: list[dict[str, Any]]) -> None:
    """Writes settings and rows as JSON."""
    assert settings.log is not None
    meta = {"script": options.script(), "title": task.title, "settings": vars(settings), **task.facts}
    Path(settings.log).write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    settings = parse(arguments)
    torch.set_num_threads(1)
    task = load(settings)
    kills = settings.kill_worker_at is not None
    per_update = 1 if settings.mode == "sync" else max(1, sc.launch.detect().size - settings.servers)
    try:
        out = sc.ps.run(
            lambda rank, size: work(settings, task, rank, size),
            servers=settings.servers,
            optimizer=shard_optimizer(settings),
            mode=make_mode(settings),
            pull=None if settings.pull_density is None else sc.TopK(settings.pull_density),
            rate=lambda version: rate(settings, min(version // per_update, settings.steps)),
            fault_tolerant=True if kills else None,
        )
    except (sc.ConfigError, sc.LaunchError) as error:
        options.fail(str(error))
    if out.rank == 0 and settings.log is not None:
        write_log(settings, task, out.result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
