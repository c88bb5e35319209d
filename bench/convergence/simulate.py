"""Simulates P ranks in one process, to see what each part of a method does to the loss, in a minute or two.

    python bench/convergence/simulate.py code --dense
    python bench/convergence/simulate.py code --ranks 8 --density 0.01 --moment own --ahead 1 --no-infer
    python bench/convergence/simulate.py cnn --ranks 4 --steps 3000 --fall 0.05

Tasks, rates and weight decay are those of the study of five tasks, with AdamW. No messages are sent and nothing is
rounded; alignments are exact, for each parameter. docs/convergence.md explains the switches and shows results.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import options
import study_data
import text_task
import torch
from convergence_study import MODELS
from optimizers import rate
from options import ADAM_BETA2, Settings
from study_gpt import GPTTask
from task import Task, draw
from torch import Tensor
from transfer_cells import RATES

from sparsecomm.optim.adamw import beta1_for

TASKS = ("code", "prose", "cnn", "lstm", "tied")
NEWEST = 0.05  # weight of a step in the running means of an alignment
EPS = 1e-8
BETA1 = 0.9


def make_task(name: str, words: Sequence[str]) -> tuple[Task, Settings]:
    """Returns a task of the study and its settings; exits with status 2 if its data are missing."""
    model = MODELS[name]
    if model.needs is not None and not model.needs.exists():
        options.fail(f"{model.needs} is missing: python bench/convergence/{study_data.__name__}.py makes it")
    flags = [w for k, v in model.flags.items() if v is not True for w in ("--" + k.replace("_", "-"), str(v))]
    module: Any = importlib.import_module(model.script.removesuffix(".py"))
    settings = module.parse(
        [*flags, "--judge", "test", "--lr", str(RATES[name, "adamw"][0]), "--beta1", str(BETA1), *words]
    )
    if name == "cnn":
        return module.FashionTask(settings, module.load_fashion(study_data.FASHION)), settings
    corpus = text_task.load(settings)
    task: Task = module.LSTMTask(settings, corpus, "LSTM") if name == "lstm" else GPTTask(settings, corpus)
    return task, settings


class FlatModel:
    """A model whose parameters and gradients are slices of two flat vectors.

    Attributes:
        at: float32, shape (n,), the parameters.
        grad: float32, shape (n,), their gradients.
        part: int64, shape (n,), number of the parameter that an element belongs to.
        decays: float32, shape (n,), 1 for the elements of matrices, which decay, else 0.
    """

    def __init__(self, task: Task, settings: Settings, ranks: int) -> None:
        self.task, self.settings, self.ranks = task, settings, ranks
        self.model = task.build()
        parameters = list(self.model.parameters())
        sizes = torch.tensor([p.numel() for p in parameters])
        self.at = torch.cat([p.detach().flatten() for p in parameters]).clone()
        self.grad = torch.zeros_like(self.at)
        self.part = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self.decays = torch.tensor([float(p.dim() >= 2) for p in parameters])[self.part]
        pieces = zip(
            parameters, torch.split(self.at, sizes.tolist()), torch.split(self.grad, sizes.tolist()), strict=True
        )
        for p, at, grad in pieces:
            p.data, p.grad = at.view_as(p), grad.view_as(p)

    def gradient(self, at: Tensor, rank: int, step: int) -> Tensor:
        """Returns a rank's gradient at some parameters, valid until the next call."""
        self.at.copy_(at)
        self.grad.zero_()
        self.model(*draw(self.task, self.settings, rank=rank, size=self.ranks, step=step)).backward()
        return self.grad

    @torch.no_grad()
    def loss(self, at: Tensor) -> float:
        """Returns the mean loss of the held-out batches."""
        self.at.copy_(at)
        batches = self.task.held_out()
        return sum(float(self.task.measure(self.model, *b)[0]) for b in batches) / len(batches)


@dataclass
class Agreement:
    """Running means of the squares from which an alignment follows, for each parameter, as `sc.feedback.Alignment`."""

    part: Tensor
    count: int = 0
    mean: Tensor = field(init=False)
    each: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros(int(self.part.max()) + 1)
        self.each = torch.zeros_like(self.mean)

    def add(self, vectors: Tensor) -> None:
        """Adds a step's vectors, shape (P, n). The first ones count alike."""
        self.count += 1
        weight = max(NEWEST, 1.0 / self.count)
        self.mean.lerp_(torch.zeros_like(self.mean).index_add_(0, self.part, vectors.mean(0).square()), weight)
        self.each.lerp_(torch.zeros_like(self.each).index_add_(0, self.part, vectors.square().mean(0)), weight)

    def of(self, ranks: int) -> Tensor:
        """Returns the alignment of every element, in [1/P, 1], shape (n,)."""
        return (self.mean / (self.each + 1e-30)).clamp(1 / ranks, 1)[self.part]

    def whole(self, ranks: int) -> float:
        """Returns the alignment of all elements together, in [1/P, 1]; 1 before the first step."""
        if not self.count:
            return 1.0
        return min(1.0, max(1 / ranks, float(self.mean.sum() / (self.each.sum() + 1e-30))))


class Method:
    """Adam before compression with error feedback, with the switches of the command line."""

    def __init__(self, switches: argparse.Namespace, model: FlatModel) -> None:
        self.s, self.ranks = switches, switches.ranks
        shape = (self.ranks, model.at.numel())
        self.momentum, self.second, self.residual = (torch.zeros(shape) for _ in range(3))
        self.exact = torch.zeros(shape[1])
        self.lr = 0.0  # the rate for which the residuals are scaled
        self.gradients, self.residuals = Agreement(model.part), Agreement(model.part)

    def ahead(self, x: Tensor, rank: int, lr: float) -> Tensor:
        """Returns the parameters at which a rank takes its gradient."""
        if self.s.ahead == "0":
            return x
        weight = self.residuals.of(self.ranks) if self.s.ahead == "aligned" else 1.0
        return x - lr * weight * self.residual[rank]

    def _clip(self, grads: Tensor) -> None:
        """Clips each rank's gradient."""
        alignment, squares = self.gradients.whole(self.ranks), grads.square().sum(dim=1, keepdim=True)
        max_norm = self.s.clip / math.sqrt(self.ranks if self.s.clip_by == "ranks" else alignment)
        if self.s.clip_by == "average":
            squares = alignment * squares + (1 - alignment) * self.gradients.each.sum()
        self.gradients.add(grads)
        grads *= (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1)

    def follow(self, lr: float) -> None:
        """Scales the residuals to a new rate."""
        if self.s.follow and self.lr:
            self.residual *= self.lr / lr
        self.lr = lr

    def update(self, grads: Tensor, step: int, density: float) -> Tensor:
        """Adds the updates of all gradients, shape (P, n), to the residuals. Returns the average of what is sent."""
        short = self.s.short or self.s.moment == "exact"
        beta1 = beta1_for(BETA1, density) if self.s.shorter and self.ranks > 1 else BETA1
        beta2 = ADAM_BETA2 if short else ADAM_BETA2 ** (1 / self.ranks)
        self._clip(grads)
        self.momentum.lerp_(grads, 1 - beta1)
        self.second.lerp_(grads.square(), 1 - beta2)
        self.exact.lerp_(grads.mean(0).square(), 1 - beta2)
        second = self.exact if self.s.moment == "exact" else self.second
        if self.s.moment == "average":
            second = second * self.gradients.of(self.ranks)
        scale = (1 - beta1 ** (step + 1)) / math.sqrt(1 - beta2 ** (step + 1))
        self.residual += self.momentum / scale / (second.sqrt() + EPS * math.sqrt(1 - beta2 ** (step + 1)))
        sent = self._send(max(1, int(density * grads.shape[1])))
        self.residuals.add(self.residual)
        return sent

    def _send(self, k: int) -> Tensor:
        """Takes each rank's k largest elements out of its residual. Returns their average, with what it infers."""
        chosen = torch.zeros_like(self.residual, dtype=torch.bool)
        chosen.scatter_(1, self.residual.abs().topk(k, dim=1).indices, value=True)
        sums, count = (self.residual * chosen).sum(0), chosen.sum(0)
        self.residual[chosen] = 0
        if self.s.infer and self.ranks > 1:
            common = (self.residuals.of(self.ranks) - 1 / self.ranks) / (1 - 1 / self.ranks)
            expected = sums * common / (count * common + 1 - common)
            sums = sums + (self.ranks - count) * expected
            self.residual -= expected * ~chosen
        average: Tensor = sums / self.ranks
        return average


def density_at(switches: argparse.Namespace, step: int) -> float:
    """Returns the density of a step, which falls geometrically from 25%."""
    falling = switches.fall * switches.steps
    if step >= falling:
        return float(switches.density)
    return float(0.25 * (switches.density / 0.25) ** (step / falling))


def simulate(switches: argparse.Namespace, task: Task, settings: Settings) -> tuple[float, float, float]:
    """Trains. Returns the final loss, the loss with all residuals applied, and the share of all elements sent."""
    model = FlatModel(task, settings, switches.ranks)
    method, x, sent = Method(switches, model), model.at.clone(), 0.0
    grads = torch.zeros(switches.ranks, x.numel())
    momentum, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(switches.steps):
        lr = rate(settings, step)
        method.follow(lr)
        for rank in range(switches.ranks):
            at = x if switches.dense else method.ahead(x, rank, lr)
            grads[rank] = model.gradient(at, rank, step)
        if switches.dense:
            g = grads.mean(0)
            g *= min(1.0, switches.clip / (float(g.norm()) + 1e-6))
            momentum.lerp_(g, 1 - BETA1)
            second.lerp_(g.square(), 1 - ADAM_BETA2)
            corrected = (second / (1 - ADAM_BETA2 ** (step + 1))).sqrt() + EPS
            update, sent = momentum / (1 - BETA1 ** (step + 1)) / corrected, sent + 1.0
        else:
            density = density_at(switches, step)
            update, sent = method.update(grads, step, density), sent + density
        x -= lr * (settings.weight_decay * model.decays * x + update)
    return model.loss(x), model.loss(x - lr * method.residual.mean(0)), sent / switches.steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--dense", action="store_true", help="AdamW on the average gradient")
    parser.add_argument("--ranks", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--density", type=float, default=0.01, help="final density (default %(default)s)")
    parser.add_argument("--fall", type=float, default=0.5, help="share of the run in which it falls (%(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="max_norm (default %(default)s)")
    parser.add_argument(
        "--clip-by",
        choices=("average", "alignment", "ranks"),
        default="average",
        help="clip by the expected norm of the average gradient; or each rank by its own norm alone, to max_norm over "
        "the root of the gradients' alignment, or of the number of ranks",
    )
    parser.add_argument("--short", action="store_true", help="second moments decay as dense's, not by the P-th root")
    parser.add_argument("--moment", choices=("own", "average", "exact"), default="average", help="second moment")
    parser.add_argument("--ahead", choices=("0", "1", "aligned"), default="aligned", help="weight of the residual")
    parser.add_argument("--no-infer", dest="infer", action="store_false", help="send without inferring")
    parser.add_argument(
        "--no-follow", dest="follow", action="store_false", help="residuals stay as they are when the rate changes"
    )
    parser.add_argument(
        "--whole-beta1", dest="shorter", action="store_false", help="first moments average over as much as dense's"
    )
    parser.add_argument("--task-flags", default="", help="more options of the task's script, in one word")
    switches = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = [*switches.task_flags.split(), "--steps", str(switches.steps), "--seed", str(switches.seed)]
    task, settings = make_task(switches.task, words)
    began = time.perf_counter()
    loss, flushed, sent = simulate(switches, task, settings)
    what = "dense" if switches.dense else f"{switches.moment} moment, ahead {switches.ahead}, infer {switches.infer}"
    print(
        f"{switches.task}, {switches.ranks} ranks, {switches.steps} steps, {what}: loss {loss:.4f}, with all residuals "
        f"applied {flushed:.4f}; 1/{1 / sent:.0f} of all elements sent; {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
