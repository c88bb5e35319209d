"""`bench peers`: the same training with every method, between hosts whose links have a given rate."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sparsecomm.errors import ConfigError
from sparsecomm.launch import detect
from sparsecomm.tools.benches import bench, meta, table
from sparsecomm.tools.benches.methods import Run, load_plugins, runs_of
from sparsecomm.tools.benches.plots_train import plots, run_label
from sparsecomm.tools.benches.tasks import Task, task
from sparsecomm.tools.benches.training import FEWEST_STEPS, error_row
from sparsecomm.tools.lab import Lab, LabError, missing
from sparsecomm.tools.lab.network import bits_per_second

__all__ = ["Jobs", "plots", "print_table", "run", "steps_for"]

_FLOOR = Run("none")
_START_SECONDS = 60.0  # limit for mpirun and the imports of all ranks, on a busy machine
_STEP_SECONDS = 0.5  # computation of a step of the default task, with four ranks on two cores
_RATE_SECONDS = 12.0  # duration of a run, if its steps are dense


@bench("peers", keys=("method", "rate", "density", "world", "task"), measures=("step_seconds", "exposed_seconds"))
def run(
    rates: Sequence[str] = ("100mbit", "1gbit", "10gbit"),
    hosts: int = 4,
    methods: Sequence[str] = (),
    densities: Sequence[float] = (0.01, 0.001),
    steps: int = 0,
    loss_steps: int = 20,
    rounds: int = 2,
    task_name: str = "mlp",
    plugins: Sequence[str] = (),
    pin: bool = False,
) -> dict[str, Any]:
    """Compares training methods between hosts with links of given rates. Needs root; starts mpirun itself.

    All methods run in turn in every round, so that noise from outside affects all of them equally. Losses do not depend
    on the rate and come from one longer run of each method at the highest rate.

    Args:
        rates: Rates of the links, in tc's units, such as 1gbit.
        hosts: Number of hosts, with one rank on each.
        methods: Methods to compare; by default all but special ones. An unknown name lists all methods.
        densities: Densities for the methods that have one.
        steps: Training steps per run; 0 chooses a number that takes reasonable time at each rate.
        loss_steps: Training steps in the runs that give the losses; 0 takes losses from the timed runs.
        rounds: Repetitions of each run.
        task_name: Model to train: mlp (25.2M parameters), cnn or gpt.
        plugins: Modules that register more methods, importable on all hosts.
        pin: Run each host on a core of its own, so that exposed time is communication and not scheduling.

    Returns:
        ``{"meta": {...}, "rows": [...]}`` with a row per rate and run: method, rate, density, world, task, numel,
        steps, timed_steps, step_seconds (median over rounds), step_spread (largest over rounds), cpu_seconds,
        exposed_seconds (step_seconds minus that of `none` in the same round, median over rounds), bytes_per_step,
        bytes_are, wire_bytes_per_step, final_loss, loss_steps, curve (a list of [step, bytes, loss]) and error. The row
        of a run that failed, hung or lacks a package has the reason as error and no figures.

    Raises:
        ConfigError: An argument is not acceptable; raised before anything runs.
        LabError: This machine cannot make such hosts, or has too few cores to pin them.
    """
    load_plugins(plugins)
    chosen, runs = task(task_name), runs_of(methods, densities)
    _refuse(rates, hosts, steps, loss_steps, rounds)
    problem = missing()
    if problem:
        raise LabError(f"no lab can be made here: {problem}")
    runs = [_FLOOR, *(r for r in runs if r != _FLOOR)]
    by_rate = {rate: steps or steps_for(_bits(rate), hosts, _numel(chosen)) for rate in sorted(rates, key=_bits)}
    fastest = max(rates, key=_bits)
    lab = Lab(hosts=hosts, rate=fastest, name=f"peers{os.getpid() % 10000}", pin=pin)
    return _measure(lab, chosen, runs, by_rate, loss_steps, rounds, plugins)


def _refuse(rates: Sequence[str], hosts: int, steps: int, loss_steps: int, rounds: int) -> None:
    if detect().size > 1:
        raise ConfigError(
            f"{detect().launcher} started {detect().size} ranks: start bench peers once, without a launcher"
        )
    if not rates:
        raise ConfigError("rates: give at least one, such as 1gbit")
    for rate in rates:
        _bits(rate)
    if hosts < 2:
        raise ConfigError(f"hosts = {hosts}: 2 at least, since one host sends nothing")
    if rounds < 1:
        raise ConfigError(f"rounds = {rounds}: 1 at least")
    for name, value in (("steps", steps), ("loss_steps", loss_steps)):
        if value != 0 and value < FEWEST_STEPS:
            raise ConfigError(f"{name} = {value}: {FEWEST_STEPS} at least, or 0")


def _bits(rate: str) -> int:
    """Returns a rate in bits per second; raises LabError for anything else."""
    bits = bits_per_second(rate)
    assert bits is not None, rate
    return bits


def steps_for(bits: float, hosts: int, numel: int) -> int:
    """Returns the number of training steps in a run of reasonable length, given the links' bits per second."""
    return max(FEWEST_STEPS, min(8, int(_RATE_SECONDS / (_STEP_SECONDS + _dense_seconds(bits, hosts, numel)))))


def _dense_seconds(bits: float, hosts: int, numel: int) -> float:
    """Returns the seconds that a float32 ring allreduce takes on the wire."""
    return 2 * (hosts - 1) / hosts * numel * 32 / bits


def _numel(chosen: Task) -> int:
    return sum(p.numel() for p in chosen.build().parameters())


@dataclass(frozen=True)
class Jobs:
    """Starts jobs that run several methods in turn; after a failure, another job runs the remaining methods.

    Attributes:
        launch: Runs a command under mpirun, given a timeout in seconds, and returns the finished process. It may raise
            TimeoutExpired.
        world: Number of ranks that it starts.
        options: Options of the worker (`sparsecomm.tools.benches.training`).
        limit: Seconds after which a run counts as hung.
    """

    launch: Callable[[list[str], float], subprocess.CompletedProcess[str]]
    world: int
    options: Sequence[str]
    limit: float

    def rows(self, runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
        """Returns a row for each run, with its figures or its error."""
        left, rows = list(runs), {}
        while left:
            out, problem = self._launch(left)
            for row in out:
                rows[left.pop(0)] = row
            if left and not problem:
                problem = "its job ended with neither a result nor an error"
            if left:
                failed = left.pop(0)
                rows[failed] = error_row(failed, self.world, problem)
        return rows

    def _launch(self, runs: Sequence[Run]) -> tuple[list[dict[str, Any]], str]:
        """Returns the rows that a job printed, in the order of `runs`, and why it ended early ("" if it did not)."""
        command = [sys.executable, "-m", "sparsecomm.tools.benches.training", "--runs", ",".join(map(str, runs))]
        command += [*self.options, "--limit", f"{self.limit:g}"]
        try:
            done = self.launch(command, _START_SECONDS + (self.limit + 5.0) * len(runs))
            printed, problem = done.stdout, _reason(done.stderr, done.returncode, self.limit)
        except subprocess.TimeoutExpired as late:
            printed = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            problem = f"its job did not end within {late.timeout:.0f} s"
        lines = printed.splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"method"')], problem


def _reason(errors: str, code: int, limit: float) -> str:
    """Returns why a job failed, in one line, given its error output and exit code; "" if it succeeded."""
    if code == 0:
        return ""
    if re.search(r"^(\[.*\])?Timeout \(\d", errors, re.MULTILINE):
        return f"hung: not done after {limit:.0f} s"
    own = re.search(r"sparsecomm: (rank \d+ of \d+ failed with .*?)(; ending the job|$)", errors, re.MULTILINE)
    if own:
        return own.group(1)
    signal = re.search(r"exited on signal (.*)", errors)
    if signal:
        return f"a rank was ended by signal {signal.group(1).rstrip('.')}"
    lines = [line.strip() for line in errors.splitlines() if line.strip(" -")]
    return f"exit code {code}: {lines[-1] if lines else 'nothing was printed'}"


def _measure(
    lab: Lab,
    chosen: Task,
    runs: Sequence[Run],
    by_rate: Mapping[str, int],
    loss_steps: int,
    rounds: int,
    plugins: Sequence[str],
) -> dict[str, Any]:
    """Runs all methods in a lab behind a progress bar and returns the result. Makes the lab, at its fastest rate."""
    numel, hosts, fastest = _numel(chosen), len(lab.hosts), lab.rate
    assert fastest is not None
    base = ["--task", chosen.name, "--plugins", ",".join(plugins)]
    jobs = rounds * len(by_rate) + (1 if loss_steps else 0)
    samples: dict[tuple[str, Run], list[dict[str, Any]]] = {(rate, r): [] for rate in by_rate for r in runs}
    path = os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH")]))
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with _progress() as progress, lab:
        bar = progress.add_task("", total=jobs)

        def rows_at(rate: str, steps: int, stage: str, wanted: Sequence[Run], *more: str) -> dict[Run, dict[str, Any]]:
            progress.update(bar, description=f"{rate}: {stage}, {len(wanted)} runs of {steps} steps")
            lab.set_rate(rate)
            limit = 60.0 + 4 * steps * (_STEP_SECONDS + _dense_seconds(_bits(rate), hosts, numel))
            options = [*base, "--steps", str(steps), *more]
            found = Jobs(
                lambda line, timeout: lab.mpirun(line, ranks=hosts, env=env, timeout=timeout), hosts, options, limit
            ).rows(wanted)
            progress.advance(bar)
            return found

        for number in range(rounds):
            for rate, steps in by_rate.items():
                # A run that failed once is not repeated, since a second attempt may take until its limit.
                wanted = [r for r in runs if not any(s["error"] for s in samples[rate, r])]
                for r, row in rows_at(rate, steps, f"round {number + 1} of {rounds}", wanted).items():
                    samples[rate, r].append(row)
        losses: dict[Run, dict[str, Any]] = {}
        if loss_steps:
            every = max(1, loss_steps // 6)
            sound = [r for r in runs if not any(s["error"] for s in samples[fastest, r])]
            losses = rows_at(fastest, loss_steps, "losses", sound, "--eval-every", str(every))
    rows = [_row(rate, r, samples[rate, r], samples[rate, _FLOOR], losses.get(r), hosts) for rate, r in samples]
    about = {"hosts": hosts, "rounds": rounds, "steps": dict(by_rate), "loss_steps": loss_steps, "numel": numel}
    about |= {
        "task": chosen.name,
        "batch": chosen.batch,
        "lr": chosen.lr,
        "fastest": fastest,
        "cores_of_hosts": lab.cores,
    }
    return {"meta": meta() | about, "rows": rows}


def _root() -> Path:
    """Returns the folder that contains the package `sparsecomm`."""
    return Path(__file__).resolve().parents[3]


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _row(
    rate: str,
    wanted: Run,
    samples: Sequence[Mapping[str, Any]],
    floor: Sequence[Mapping[str, Any]],
    loss: Mapping[str, Any] | None,
    hosts: int,
) -> dict[str, Any]:
    """Returns the row of a run at a rate.

    Args:
        rate: Rate of the links.
        wanted: Method and density.
        samples: Rows of its timed runs, one per round.
        floor: Rows of `none` in the same rounds.
        loss: Row of the run that gives the loss; None takes the last timed run.
        hosts: Number of hosts.
    """
    failed = next((s["error"] for s in samples if s["error"]), None)
    row = {"rate": rate, **error_row(wanted, hosts, failed)}
    if failed is not None:
        return row
    pairs = [s["step_seconds"] - f["step_seconds"] for s, f in zip(samples, floor, strict=False) if not f["error"]]
    source = samples[-1] if loss is None or loss["error"] else loss
    return row | {
        "task": source["task"],
        "numel": source["numel"],
        "steps": samples[0]["steps"],
        "timed_steps": sum(s["timed_steps"] for s in samples),
        "step_seconds": statistics.median(s["step_seconds"] for s in samples),
        "step_spread": max(s["step_spread"] for s in samples),
        "cpu_seconds": statistics.median(s["cpu_seconds"] for s in samples),
        "exposed_seconds": statistics.median(pairs) if pairs else None,
        "bytes_per_step": round(statistics.median(s["bytes_per_step"] for s in samples)),
        "bytes_are": source["bytes_are"],
        "wire_bytes_per_step": samples[0]["wire_bytes_per_step"],
        "final_loss": source["final_loss"],
        "loss_steps": source["steps"],
        "curve": [[step, sent, value] for step, _, sent, value in source["curve"]],
    }


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a table per rate, and below it the errors of runs without figures."""
    out = console or Console()
    about = result["meta"]
    for rate in dict.fromkeys(row["rate"] for row in result["rows"]):
        rows = [row | {"run": run_label(row)} for row in result["rows"] if row["rate"] == rate]
        columns = {
            "method": ("run", ""),
            "step s": ("step_seconds", ".3f"),
            "spread": ("step_spread", ".0%"),
            "cpu s": ("cpu_seconds", ".3f"),
            "exposed s": ("exposed_seconds", ".3f"),
            "bytes/step": ("bytes_per_step", ",d"),
            "are": ("bytes_are", ""),
            "on the wire": ("wire_bytes_per_step", ",d"),
            "loss": ("final_loss", ".3f"),
        }
        pinned = " with a core each" if about.get("cores_of_hosts") else ""
        title = f"{rate}, {about['hosts']} hosts{pinned}, {about['task']} of {about['numel'] / 1e6:.1f}M parameters"
        out.print(table(title, rows, columns))
        for row in rows:
            if row["error"]:
                out.print(f"  {row['run']}: {row['error']}", markup=False, highlight=False, soft_wrap=True)
