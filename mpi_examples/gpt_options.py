"""Command line of train_gpt.py, checked before anything is started."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from gpt_model import SIZES

COMPRESSORS = ("none", "dense", "topk", "threshold")
# Settings that shape the trajectory: a resumed run must repeat them.
TRAJECTORY = (
    *("size", "compressor", "density", "warmup_steps", "warmup_densities", "value_codec", "index_codec"),
    *("collective", "seed", "steps", "batch", "block", "lr", "beta1", "clip"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line, parsed; ``--help`` explains each."""

    size: str
    text: str | None
    compressor: str
    density: float
    warmup_steps: int
    warmup_densities: tuple[float, ...]
    value_codec: str
    index_codec: str
    collective: str
    seed: int
    steps: int
    batch: int
    block: int
    lr: float
    beta1: float
    clip: float
    eval_every: int
    out: str | None
    resume: bool
    save_every: int
    stop_after: int | None
    log: str | None
    plot: str | None
    tensorboard: str | None
    progress: str

    @property
    def sparse(self) -> bool:
        """Whether the compressor selects coordinates."""
        return self.compressor in ("topk", "threshold")

    @property
    def last_step(self) -> int:
        """The step this run ends at."""
        return self.steps if self.stop_after is None else min(self.steps, self.stop_after)


def launcher_rank() -> int:
    """This process's rank as its launcher says, before anything is initialised; 0 without a launcher."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def fail(message: str) -> NoReturn:
    """End this process with status 2 and a message, printed once.

    What is wrong is usually wrong on every rank. Rank 0 speaks, and its exit makes the launcher end the
    others; a rank that is still alive after two seconds has a problem of its own and says so.
    """
    rank = launcher_rank()
    if rank:
        time.sleep(2.0)
    print(f"train_gpt.py: error{f' on rank {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    """argparse, but one rank speaks for all."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")

    def print_help(self, file: object = None) -> None:
        if launcher_rank() == 0:
            print(self.format_help())


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _density(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _densities(text: str) -> tuple[float, ...]:
    return tuple(_density(part) for part in text.split(","))


def _rate(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _beta(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _parser(description: str) -> _Parser:
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train")
    what.add_argument("--size", choices=tuple(SIZES), default="demo", help="model (default %(default)s)")
    what.add_argument("--text", metavar="FILE", help="text to learn (default: Python's standard library)")
    what.add_argument("--steps", type=_positive, default=400, help="updates in all (default %(default)s)")
    what.add_argument("--batch", type=_positive, default=8, help="sequences per rank (default %(default)s)")
    what.add_argument("--block", type=_positive, default=64, help="bytes per sequence (default %(default)s)")
    what.add_argument("--lr", type=_rate, default=1e-3, help="peak rate (default %(default)s)")
    what.add_argument("--beta1", type=_beta, default=0.8, help="Adam's momentum (default %(default)s)")
    what.add_argument("--clip", type=_rate, default=1.0, help="gradient norm limit (default %(default)s)")
    what.add_argument("--seed", type=_count, default=0, help="of model and batches (default %(default)s)")

    how = parser.add_argument_group("how to communicate")
    how.add_argument("--compressor", choices=COMPRESSORS, default="topk", help="none: plain DDP (default %(default)s)")
    how.add_argument("--density", type=_density, default=0.01, help="share sent (default %(default)s)")
    how.add_argument("--warmup-steps", type=_count, default=0, help="steps of higher density (default none)")
    how.add_argument(
        "--warmup-densities",
        type=_densities,
        default=(0.25, 0.063, 0.015),
        metavar="D,D,...",
        help="stages of the density warm-up, of equal length (default .25,.063,.015)",
    )
    how.add_argument("--value-codec", default="fp16", help="values on the wire (default %(default)s)")
    how.add_argument("--index-codec", default="auto", help="indices on the wire (default %(default)s)")
    how.add_argument(
        "--collective",
        choices=("auto", "allgather", "dense"),
        default="auto",
        help="auto: whatever sends less (default %(default)s)",
    )

    out = parser.add_argument_group("what to keep")
    out.add_argument("--eval-every", type=_positive, default=50, help="validate (default %(default)s)")
    out.add_argument("--out", metavar="DIR", help="keep checkpoints here, one at the end at least")
    out.add_argument("--save-every", type=_count, default=0, help="steps between checkpoints (default: end)")
    out.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    out.add_argument("--stop-after", type=_positive, metavar="STEP", help="end early here, to resume later")
    out.add_argument("--log", metavar="JSON", help="write settings and one row a step")
    out.add_argument("--plot", metavar="PNG", help="draw the loss (an SVG goes beside it)")
    out.add_argument("--tensorboard", metavar="DIR", help="write scalars for TensorBoard (rank 0)")
    out.add_argument("--progress", choices=("auto", "on", "off"), default="auto", help="progress bar")
    return parser


def parse(arguments: Sequence[str] | None, description: str) -> Settings:
    """Parse and check the command line; exits with status 2 and one message if it is wrong."""
    parser = _parser(description)
    settings = Settings(**vars(parser.parse_args(arguments)))
    stages = len(settings.warmup_densities)
    if (settings.resume or settings.save_every) and settings.out is None:
        parser.error("--resume and --save-every need --out DIR")
    if settings.warmup_steps and not settings.sparse:
        parser.error(f"--warmup-steps has no meaning with --compressor {settings.compressor}")
    if settings.warmup_steps % stages:
        parser.error(f"--warmup-steps {settings.warmup_steps} is no multiple of its {stages} densities")
    if settings.warmup_steps > settings.steps:
        parser.error(f"--warmup-steps {settings.warmup_steps} is more than --steps {settings.steps}")
    if settings.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'sparsecomm[demo]'")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs tensorboard: pip install 'sparsecomm[demo]'")
    return settings
