"""Trains a model with PyTorch DDP over MPI, with gradients compressed by sparsecomm.

The scripts study_*.py share this code; each defines a ``Task`` (task.py), the model and its data. ``make_state``
(compression.py) makes the ``SparseState``, and ``wrap`` registers ``sparse_hook``.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import checkpointing
import torch
import torch.distributed as dist
import torch_hooks
from checkpointing import CheckpointError
from compression import make_state
from optimizers import make_optimizer, rate
from options import TORCH_HOOKS, TRAJECTORY, Settings, script
from run_log import Row, RunLog, plot
from task import Batch, Task, draw, rank_batch
from tensorboard_log import Scalars
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from train_report import Report

import sparsecomm as sc
from sparsecomm.tools.benches.methods import Attached

# Within these steps a dense run sends as many bytes as a whole top-k run.
EARLY_EVALS = frozenset({1, 2, 3, 4, 6, 8, 12, 16, 24, 32})


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable elements; a tied matrix counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass
class Trainer:
    """The training of one rank: settings, model, optimizer, log and progress.

    Attributes:
        ddp: The model with the hook.
        state: State of our hook; None for plain DDP and torch's hooks.
        step: Number of updates done.
        bytes_before: Bytes that the state's counter shows and that this run did not send, when it was resumed.
    """

    settings: Settings
    rank: int
    size: int
    task: Task
    model: nn.Module
    ddp: Attached
    optimizer: torch.optim.Optimizer
    state: sc.SparseState | None
    log: RunLog
    step: int = 0
    bytes_before: int = 0

    @property
    def dense_bytes(self) -> int:
        """Bytes that a ring allreduce of fp32 gradients sends from one rank in one step."""
        return 2 * 4 * count_parameters(self.model) * (self.size - 1) // self.size


def wrap(settings: Settings, model: nn.Module, state: sc.SparseState | None) -> Attached:
    """Returns the model in DDP with the hook. Collective.

    Gradients are views of DDP's buckets with every method, since times are compared.
    """
    if state is None:
        return torch_hooks.attach(settings, model)
    ddp = DDP(model, gradient_as_bucket_view=True)
    ddp.register_comm_hook(state, sc.sparse_hook)
    return Attached(ddp, lambda step: state.last_step().bytes_sent, counted=True)


def backward(trainer: Trainer) -> Tensor:
    """Computes the gradients of the next step and averages them over the ranks; returns the loss. Collective."""
    trainer.optimizer.zero_grad(set_to_none=True)
    inputs, targets = draw(trainer.task, trainer.settings, rank=trainer.rank, size=trainer.size, step=trainer.step)
    loss: Tensor = trainer.ddp.model(inputs, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def train_step(trainer: Trainer) -> None:
    """Makes one update and adds its row to the log. Collective."""
    settings, before = trainer.settings, trainer.log.rows[-1]
    began = time.perf_counter()
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate(settings, trainer.step)
    loss = backward(trainer)
    limit = math.inf if settings.updates_before else settings.clip
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), limit)
    if not math.isfinite(norm):  # the norm is the same on every rank, so all ranks stop here
        event = f"the gradient's norm became {norm.item()} at step {trainer.step + 1}"
        fail_together(f"{event}; try a lower --lr than {settings.lr:g}")
    trainer.optimizer.step()
    value = training_loss(trainer, loss)
    seconds = before.seconds + time.perf_counter() - began
    trainer.step += 1
    sent = bytes_sent(trainer)
    ratio = trainer.dense_bytes / (sent - before.bytes_sent) if sent > before.bytes_sent else None
    trainer.log.rows.append(
        Row(
            step=trainer.step,
            train_loss=value,
            val_loss=None,
            seconds=seconds,
            bytes_sent=sent,
            ratio=ratio,
        )
    )


def training_loss(trainer: Trainer, loss: Tensor) -> float:
    """Returns the loss of a step's batch: this rank's, or with ``--global-batch`` the mean of all. Collective.

    The mean is that of the same examples for any number of ranks, so that runs with 2 and with 16 compare.
    """
    value = loss.detach().clone()
    if trainer.settings.global_batch is not None and trainer.size > 1:
        dist.all_reduce(value)
        value /= trainer.size
    return value.item()


def bytes_sent(trainer: Trainer) -> int:
    """Returns the gradient bytes that this rank has sent since step 0, after a step that is not in the log yet."""
    if trainer.state is None:
        return trainer.log.rows[-1].bytes_sent + trainer.ddp.step_bytes(trainer.step - 1)
    return trainer.state.metrics().bytes_sent - trainer.bytes_before


@torch.no_grad()
def evaluate(trainer: Trainer, batches: Sequence[Batch]) -> None:
    """Adds held-out loss and accuracy to the newest row; each rank measures some of the batches. Collective."""
    total = torch.zeros(2, dtype=torch.float64)
    measures_accuracy = torch.zeros(1, dtype=torch.float64)
    for inputs, targets in batches[trainer.rank :: trainer.size]:
        loss, accuracy = trainer.task.measure(trainer.model, inputs, targets)
        total[0] += loss.double()
        if accuracy is not None:
            total[1] += accuracy.double()
            measures_accuracy += 1
    sums = torch.cat([total, measures_accuracy])
    dist.all_reduce(sums)
    loss_sum, accuracy_sum, measured = sums.tolist()
    trainer.log.rows[-1] = replace(
        trainer.log.rows[-1],
        val_loss=loss_sum / len(batches),
        val_accuracy=accuracy_sum / measured if measured else None,
    )


def replicas_digest(trainer: Trainer) -> tuple[str, bool]:
    """Returns the SHA-256 of this rank's parameters, and whether it is the same on all ranks. Collective."""
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(trainer.size)]
    dist.all_gather(everyone, own)
    return digest.hexdigest()[:16], all(torch.equal(own, other) for other in everyone)


def save(trainer: Trainer, folder: Path) -> None:
    """Saves a checkpoint: rank 0 writes the shared state, each rank its residual. Collective."""
    shared = {
        "meta": trainer.log.meta,
        "rows": [asdict(row) for row in trainer.log.rows],
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
    }
    comm = trainer.state.state_dict() if trainer.state else torch_hooks.state_dict(trainer.ddp)
    own = {"bytes_sent": trainer.log.rows[-1].bytes_sent, "comm": comm}
    checkpointing.save(folder, trainer.step, rank=trainer.rank, shared=shared, own=own)


def restore(trainer: Trainer, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Continues from a checkpoint. Collective.

    DDP regroups its buckets after the first backward pass, and top-k selects within a bucket. One pass is therefore
    thrown away first, so that the resumed run has the buckets of the interrupted one.
    """
    backward(trainer)
    trainer.model.load_state_dict(shared["model"])
    trainer.optimizer.load_state_dict(shared["optimizer"])
    trainer.log.rows[:] = [Row(**row) for row in shared["rows"]]
    trainer.step = trainer.log.rows[-1].step
    if trainer.state is None:
        torch_hooks.load_state_dict(trainer.ddp, own["comm"])
    else:
        trainer.state.load_state_dict(own["comm"])
        trainer.bytes_before = trainer.state.metrics().bytes_sent - own["bytes_sent"]


def fail_together(message: str | None) -> None:
    """Ends all ranks with status 2 if any has a message; rank 0 prints it. Collective."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if any(messages):
        if dist.get_rank() == 0:
            for line in dict.fromkeys(filter(None, messages)):
                print(f"{script()}: error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def read_checkpoint(
    settings: Settings, rank: int, task: Task, meta: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns the shared state and the rank's state of the checkpoint to resume, or None.

    Raises:
        CheckpointError: The checkpoint cannot be read, belongs to other settings, or would be overwritten.
    """
    folder = Path(settings.out) if settings.out else None
    if folder is None or not settings.resume:
        if folder is not None and checkpointing.exists(folder):
            raise CheckpointError(f"{folder} holds a checkpoint: --resume it, or name another --out")
        return None
    shared, own = checkpointing.load(folder, rank=rank)
    for name in (*TRAJECTORY, *task.trajectory, "world_size", "data_digest"):
        was, now = shared["meta"].get(name), meta[name]
        if was != now:
            raise CheckpointError(f"cannot resume: {name} was {was!r} in {folder}, and is {now!r} now")
    return shared, own


def describe(settings: Settings, size: int, task: Task, parameters: int) -> dict[str, Any]:
    """Returns the log's ``meta``."""
    computed = settings.compressor in ("none", *TORCH_HOOKS)
    return {
        **asdict(settings),
        "warmup_densities": list(settings.warmup_densities),
        "world_size": size,
        "parameters": parameters,
        "dense_bytes_per_step": 2 * 4 * parameters * (size - 1) // size,
        "bytes_are": "computed as a ring allreduce" if computed else "counted",
        **task.facts,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "sparsecomm": getattr(sc, "__version__", "unknown"),
        },
        "machine": platform.machine(),
    }


def make_trainer(settings: Settings, world: sc.World, task: Task) -> Trainer:
    """Makes model, DDP with the hook, optimizer and a log with row 0. Collective."""
    model = task.build()
    state = make_state(settings)
    meta = describe(settings, world.size, task, count_parameters(model))
    first = Row(step=0, train_loss=None, val_loss=None, seconds=0.0, bytes_sent=0, ratio=None)
    return Trainer(
        settings=settings,
        rank=world.rank,
        size=world.size,
        task=task,
        model=model,
        ddp=wrap(settings, model, state),
        optimizer=make_optimizer(settings, model, state),
        state=state,
        log=RunLog(meta, [first]),
    )


def prepare(settings: Settings, world: sc.World, task: Task) -> Trainer:
    """Returns a trainer at step 0 or at the checkpoint's step; ends all ranks if one of them fails. Collective."""
    checkpoint, problem = None, None
    if settings.global_batch is not None and settings.global_batch % world.size:
        fail_together(f"--global-batch {settings.global_batch} cannot be shared out evenly to {world.size} ranks")
    try:
        checkpoint = read_checkpoint(settings, world.rank, task, describe(settings, world.size, task, 0))
        make_state(settings)  # refuses options that sparsecomm does not know
    except ValueError as error:  # CheckpointError and sparsecomm's ConfigError among them
        problem = str(error)
    fail_together(problem)
    trainer = make_trainer(settings, world, task)
    if checkpoint is not None:
        restore(trainer, *checkpoint)
    return trainer


def train(trainer: Trainer, report: Report) -> None:
    """Trains until the last step, with evaluations and checkpoints. Collective."""
    settings = trainer.settings
    batches = trainer.task.held_out()
    folder = Path(settings.out) if settings.out else None
    scalars = Scalars(settings.tensorboard if trainer.rank == 0 else None, trainer.state)
    if trainer.step == 0:
        evaluate(trainer, batches)
        report.show(trainer.log.rows)
    while trainer.step < settings.last_step:
        train_step(trainer)
        last = trainer.step == settings.last_step
        early = trainer.step in EARLY_EVALS and not settings.skip_early_evals
        if last or early or trainer.step % settings.eval_every == 0:
            evaluate(trainer, batches)
        report.show(trainer.log.rows, trainer.state)
        scalars.add(trainer.log.rows[-1])
        due = settings.save_every and trainer.step % settings.save_every == 0
        if folder is not None and (last or due):
            save(trainer, folder)
    scalars.close()


def finish(trainer: Trainer, report: Report) -> int:
    """Writes log and plot, prints the result and returns the exit status. Collective."""
    settings, last = trainer.settings, trainer.log.rows[-1]
    accuracy = f", {last.val_accuracy:.2%} right" if last.val_accuracy is not None else ""
    report.say(
        f"step {last.step}: {settings.judge} loss {last.val_loss:.4f}{accuracy}, {last.seconds:.1f} s of training, "
        f"{last.bytes_sent / 1e6:.2f} MB of gradients sent per rank ({trainer.log.meta['bytes_are']})"
    )
    if trainer.state is not None and settings.collective == "auto":
        report.say(trainer.state.explain())
    if trainer.rank == 0 and settings.log:
        trainer.log.write(Path(settings.log))
    if trainer.rank == 0 and settings.plot:
        report.say("plots: {} and {}".format(*plot([trainer.log], Path(settings.plot))))
    if settings.compressor == "silent":
        report.say("replicas are not compared: every rank has trained on its own gradients")
        return 0
    digest, agree = replicas_digest(trainer)
    verdict = "agree" if agree else "DISAGREE"
    report.say(f"replicas {verdict}: parameters' SHA-256 {digest}... on rank 0 of {trainer.size}")
    return 0 if agree else 1


def run(settings: Settings, task: Task) -> int:
    """Initialises, trains, writes the output and returns the exit status. Collective."""
    world = sc.init()
    trainer = prepare(settings, world, task)
    batch = rank_batch(settings, world.size)
    with Report(
        rank=world.rank,
        steps=settings.steps,
        items_per_step=batch * task.items_per_example * world.size,
        items=task.items,
        progress=settings.progress,
    ) as report:
        report.say(
            f"{task.title}, {trainer.log.meta['parameters']:,} parameters, {world.size} rank(s) x {batch}; "
            f"{trainer.log.label}" + (f"; resumed at step {trainer.step}" if trainer.step else "")
        )
        train(trainer, report)
    return finish(trainer, report)
