"""The command line that the training scripts share, checked before anything is started."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

SPARSE = ("topk", "threshold", "chunk", "random", "cyclic")
POWERSGD = "powersgd-r"  # and the rank
TORCH_HOOKS = ("fp16", f"{POWERSGD}4", f"{POWERSGD}1", "silent")
COMPRESSORS = ("none", "dense", *SPARSE, *TORCH_HOOKS)
# Settings that shape the trajectory or its log. A resumed run must repeat them.
TRAJECTORY = (
    *("compressor", "density", "feedback", "warmup_steps", "warmup_kind", "warmup_densities", "value_codec"),
    *(
        "index_codec",
        "collective",
        "seed",
        "steps",
        "batch",
        "global_batch",
        "optimizer",
        "lr",
        "beta1",
        "momentum",
        "nesterov",
    ),
    *("weight_decay", "clip", "judge"),
)
ADAM_BETA1, ADAM_BETA2, SGD_MOMENTUM = 0.8, 0.95, 0.9
WEIGHT_DECAY = {"adamw": 0.1, "sgd": 5e-4}  # of the matrices; times the rate in every step for both


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of every training script; ``--help`` explains each.

    Attributes:
        batch: Examples per rank; has no meaning with ``global_batch``.
        beta1: Momentum of AdamW; None with SGD.
        momentum: Momentum of SGD; None with AdamW.
    """

    compressor: str
    density: float
    feedback: str
    warmup_steps: int
    warmup_kind: str
    warmup_densities: tuple[float, ...]
    value_codec: str
    index_codec: str
    collective: str
    seed: int
    steps: int
    batch: int
    global_batch: int | None
    optimizer: str
    lr: float
    beta1: float | None
    momentum: float | None
    nesterov: bool
    weight_decay: float
    clip: float
    judge: str
    eval_every: int
    skip_early_evals: bool
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
        """Whether the compressor selects elements."""
        return self.compressor in SPARSE

    @property
    def matrix_rank(self) -> int | None:
        """The rank of PowerSGD's matrices; None with other compressors."""
        if not self.compressor.startswith(POWERSGD):
            return None
        return int(self.compressor.removeprefix(POWERSGD))

    @property
    def updates_before(self) -> bool:
        """Whether the feedback, before compression, does the optimizer's part: it clips, and applies momentum."""
        return self.feedback in ("dgc", "adam", "ahead")

    @property
    def averaging(self) -> float:
        """The momentum in [0, 1) of either optimizer, whether it is applied before or after the exchange."""
        value = self.beta1 if self.optimizer == "adamw" else self.momentum
        assert value is not None, "parse sets the one that belongs to the optimizer"
        return value

    @property
    def last_step(self) -> int:
        """The step at which this run ends."""
        return self.steps if self.stop_after is None else min(self.steps, self.stop_after)


S = TypeVar("S", bound=Settings)


def script() -> str:
    """Returns the name of the running script, for its messages."""
    return Path(sys.argv[0]).name


def launcher_rank() -> int:
    """Returns this process's rank from the launcher's environment variables; 0 without a launcher."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def fail(message: str) -> NoReturn:
    """Ends this process with status 2 and a message, which is printed once.

    A mistake is usually made on every rank. Rank 0 prints it, and its exit makes the launcher end the others. A rank
    that is still alive after ten seconds has a problem that rank 0 does not have, and prints it.
    """
    rank = launcher_rank()
    if rank:
        time.sleep(10.0)
    print(f"{script()}: error{f' on rank {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An argparse parser that prints on one rank only."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        fail(f"{message} (see --help)")

    def print_help(self, file: object = None) -> None:
        """Prints the help on rank 0."""
        if launcher_rank() == 0:
            print(self.format_help())


def positive(text: str) -> int:
    """Converts the value of an option that must be an integer above 0."""
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


def _decay(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is negative or no number")
    return value


def _beta(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def make_parser(description: str, *, steps: int, batch: int, lr: float) -> tuple[Parser, argparse._ArgumentGroup]:
    """Returns a parser with the options that all scripts share.

    Args:
        description: Docstring of the script.
        steps: Default of ``--steps``.
        batch: Default of ``--batch``.
        lr: Default of ``--lr``.

    Returns:
        The parser, and the group to which a script adds options of its model and data.
    """
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=steps, help="number of updates (default %(default)s)")
    training.add_argument("--batch", type=positive, default=batch, help="examples per rank (default %(default)s)")
    training.add_argument(
        "--global-batch",
        type=positive,
        metavar="N",
        help="examples of all ranks together, in place of --batch: the ranks share out one draw of so many, and the "
        "data do not depend on their number",
    )
    training.add_argument("--seed", type=_count, default=0, help="of model and batches (default %(default)s)")
    _add_optimizer(parser, lr)
    _add_communication(parser)
    _add_output(parser)
    return parser, training


def _add_optimizer(parser: Parser, lr: float) -> None:
    how = parser.add_argument_group("optimizer")
    how.add_argument("--optimizer", choices=tuple(WEIGHT_DECAY), default="adamw", help="(default %(default)s)")
    how.add_argument("--lr", type=_rate, default=lr, help="peak rate (default %(default)s)")
    how.add_argument("--beta1", type=_beta, help=f"AdamW's momentum (default {ADAM_BETA1})")
    how.add_argument("--momentum", type=_beta, help=f"SGD's momentum (default {SGD_MOMENTUM})")
    how.add_argument("--nesterov", action="store_true", help="Nesterov momentum for SGD")
    decays = ", ".join(f"{value:g} with {name}" for name, value in WEIGHT_DECAY.items())
    how.add_argument("--weight-decay", type=_decay, help=f"of the matrices, decoupled (default {decays})")
    how.add_argument("--clip", type=_rate, default=1.0, help="limit of the gradient's norm (default %(default)s)")


def _add_communication(parser: Parser) -> None:
    how = parser.add_argument_group("communication")
    how.add_argument(
        "--compressor",
        choices=COMPRESSORS,
        default="topk",
        help="none: plain DDP; chunk, random and cyclic send the same elements from all ranks; fp16 and powersgd-r1, "
        "-r4: torch's hooks; silent: a hook that sends nothing, to time the rest of a step (default %(default)s)",
    )
    how.add_argument("--density", type=_density, default=0.01, help="share sent (default %(default)s)")
    how.add_argument(
        "--feedback",
        choices=("ef", "dgc", "adam", "ahead", "none"),
        default="ef",
        help="elements that are not sent: ef keeps them; dgc also applies momentum before compression, instead of the "
        "optimizer; adam also turns gradients into AdamW's updates before compression, instead of the optimizer; "
        "ahead: sparsecomm.optim's AdamW or SGD; none drops them (default %(default)s)",
    )
    how.add_argument(
        "--warmup-steps",
        type=_count,
        default=0,
        help="steps of higher density; with PowerSGD, steps that send whole gradients (default none)",
    )
    how.add_argument(
        "--warmup-kind",
        choices=("steps", "exp"),
        default="steps",
        help="steps: stages of equal length; exp: a geometric fall from the first warm-up density to --density "
        "(default %(default)s)",
    )
    how.add_argument(
        "--warmup-densities",
        type=_densities,
        default=(0.25, 0.063, 0.015),
        metavar="D,D,...",
        help="densities of the warm-up's stages; exp uses the first (default .25,.063,.015)",
    )
    how.add_argument("--value-codec", default="fp16", help="values on the wire (default %(default)s)")
    how.add_argument("--index-codec", default="auto", help="indices on the wire (default %(default)s)")
    how.add_argument(
        "--collective",
        default="allgather",
        help="auto: the fastest on this link, perhaps without compression (default %(default)s)",
    )


def _add_output(parser: Parser) -> None:
    out = parser.add_argument_group("output")
    out.add_argument("--eval-every", type=positive, default=50, help="steps between evaluations (default %(default)s)")
    out.add_argument(
        "--skip-early-evals", action="store_true", help="do not evaluate at steps 1, 2, 3, 4, 6, 8 ... too"
    )
    out.add_argument(
        "--judge",
        choices=("validation", "test"),
        default="validation",
        help="held-out data to evaluate on: tune on validation, report test (default %(default)s)",
    )
    out.add_argument("--out", metavar="DIR", help="folder of checkpoints; one is always saved at the end")
    out.add_argument("--save-every", type=_count, default=0, help="steps between checkpoints (default: at the end)")
    out.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    out.add_argument("--stop-after", type=positive, metavar="STEP", help="end at this step, to resume later")
    out.add_argument("--log", metavar="JSON", help="write settings and one row per step")
    out.add_argument("--plot", metavar="PNG", help="draw the loss, also as SVG")
    out.add_argument("--tensorboard", metavar="DIR", help="write scalars for TensorBoard (rank 0)")
    out.add_argument("--progress", choices=("auto", "on", "off"), default="auto", help="progress bar")


def parse(parser: Parser, kind: Callable[..., S], arguments: Sequence[str] | None) -> S:
    """Parses and checks the command line; exits with status 2 and one message if it is wrong.

    Args:
        parser: Parser of ``make_parser``, to which the script has added options.
        kind: Type of the script's settings.
        arguments: Command line; None for that of the process.
    """
    options = vars(parser.parse_args(arguments))
    _check_optimizer(parser, options)
    settings = kind(**options)
    _check_communication(parser, settings)
    if (settings.resume or settings.save_every) and settings.out is None:
        parser.error("--resume and --save-every need --out DIR")
    for flag, module in (("plot", "matplotlib"), ("tensorboard", "tensorboard")):
        if options[flag] and importlib.util.find_spec(module) is None:
            parser.error(f"--{flag} needs {module}: pip install 'sparsecomm[demo]'")
    return settings


def _check_optimizer(parser: Parser, options: dict[str, Any]) -> None:
    """Refuses options of the other optimizer and sets the defaults of this one. Mutates ``options``."""
    name = options["optimizer"]
    foreign = ("momentum", "nesterov") if name == "adamw" else ("beta1",)
    for option in foreign:
        if options[option] is not None and options[option] is not False:
            parser.error(f"--{option} has no meaning with --optimizer {name}")
    options["beta1"] = None if name == "sgd" else ADAM_BETA1 if options["beta1"] is None else options["beta1"]
    if name == "sgd" and options["momentum"] is None:
        options["momentum"] = SGD_MOMENTUM
    if options["nesterov"] and not options["momentum"]:
        parser.error("--nesterov needs a --momentum above 0")
    if options["weight_decay"] is None:
        options["weight_decay"] = WEIGHT_DECAY[name]


def _check_communication(parser: Parser, settings: Settings) -> None:
    steps, stages = settings.warmup_steps, len(settings.warmup_densities)
    if steps and not settings.sparse and settings.matrix_rank is None:
        parser.error(f"--warmup-steps has no meaning with --compressor {settings.compressor}")
    if settings.feedback != "ef" and not settings.sparse:
        parser.error(f"--feedback {settings.feedback} has no meaning with --compressor {settings.compressor}")
    if settings.feedback == "adam" and settings.optimizer != "adamw":
        parser.error(f"--feedback adam has no meaning with --optimizer {settings.optimizer}")
    if settings.sparse and settings.warmup_kind == "steps" and steps % stages:
        parser.error(f"--warmup-steps {steps} is no multiple of its {stages} densities")
    if steps and settings.warmup_kind == "exp" and settings.warmup_densities[0] < settings.density:
        first = settings.warmup_densities[0]
        parser.error(f"--warmup-kind exp falls from {first:g}, which is below --density {settings.density:g}")
    if steps > settings.steps:
        parser.error(f"--warmup-steps {steps} is more than --steps {settings.steps}")
