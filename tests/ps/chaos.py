"""Kills ranks of small parameter-server jobs at random moments and checks the survivors' parameters.

    python tests/ps/chaos.py --workers 100 --servers 30 --seed 1
    python tests/ps/chaos.py --workers 0 --servers 10 --seed 1 --first 21      # continues with trial 21
    python tests/ps/chaos.py --grid                                            # 1, 2, 4 servers x 1 to 6 workers

Each trial is one mpirun under ULFM, in which one rank SIGKILLs itself at a moment drawn from the seed: during start-up,
or at a step of the fastest worker. The job must end with status 0. Then all pushes are computed once more. Every shard
must be there and hold exactly the updates that survivors pushed, and at least the acknowledged pushes of a dead worker.
A kill after the last step tests nothing, so it is counted as late.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "jobs"), str(HERE.parent), str(HERE.parents[1])]

from helpers import job_environment, mpirun_command  # noqa: E402
from small import NUMEL, Model, gradient, killed_at, progress_of  # noqa: E402

from sparsecomm import TopK  # noqa: E402
from sparsecomm.exchange.config import SparseConfig  # noqa: E402
from sparsecomm.ps.protocol.sharding import ModelLayout  # noqa: E402
from sparsecomm.ps.worker.part import Part  # noqa: E402
from sparsecomm.runtime.arena import Arena  # noqa: E402

ULFM = ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
STEPS = 30
DENSITY = 0.1
PAUSE = 0.01
IN_START_UP = 0.15  # share of the kills
DEADLINE = 150.0  # seconds for a whole job, most of which is starting Python
VICTIMS = ("worker", "server", "nobody")
OUTCOMES = ("finished", "hung", "bad exit", "bad sums")


@dataclass(frozen=True)
class Trial:
    """One job and at most one death.

    Attributes:
        name: Name of the draw.
        victim: "worker", "server" or "nobody".
        rank: Rank that dies, or -1.
        at: Moment of the death: below 1 during start-up, else the steps that the fastest worker has done.
    """

    name: str
    victim: str
    workers: int
    servers: int
    mode: str
    pull: float
    pull_by: str
    rank: int
    at: float

    @classmethod
    def draw(cls, name: str, victim: str, workers: int = 0, servers: int = 0) -> Trial:
        """Draws everything that is not given from a name."""
        r = random.Random(f"{victim} {name}")
        # Small jobs are drawn more often, since every rank spends most of a trial importing torch.
        drawn = r.choice([2, 2, 3]), r.choice([1, 1, 2, 3]) if victim == "worker" else r.choice([2, 2, 3])
        workers, servers = workers or drawn[0], servers or drawn[1]
        rank = r.randrange(workers) if victim == "worker" else workers + r.randrange(servers)
        mode, pull = r.choice(["sync", "ssp", "async"]), r.choice([0.0, 0.3])
        pull_by = r.choice(["asked", "auto"])
        at = r.random() if r.random() < IN_START_UP else r.uniform(1, STEPS)
        return cls(name, victim, workers, servers, mode, pull, pull_by, -1 if victim == "nobody" else rank, at)


@dataclass(frozen=True)
class Result:
    """Result of a trial.

    Attributes:
        outcome: One of `OUTCOMES`.
        landed: Whether the rank died before all workers had done their last step.
        said: Details.
    """

    trial: Trial
    outcome: str
    landed: bool
    said: str
    seconds: float


def run(trial: Trial, deadline: float = DEADLINE) -> Result:
    """Runs a trial and checks the files that it leaves."""
    began = time.monotonic()

    def result(outcome: str, said: str) -> Result:
        return Result(trial, outcome, landed(trial, folder), said, time.monotonic() - began)

    with tempfile.TemporaryDirectory(prefix="sparsecomm-chaos-") as name:
        folder = Path(name)
        code, said = launch(trial, folder, deadline)
        if code is None:
            return result("hung", said)
        if code != 0:
            return result("bad exit", f"exit status {code}\n{said}")
        try:
            return result("finished", verify(trial, folder))
        except AssertionError as error:
            return result("bad sums", f"{error}\n{said}")


def launch(trial: Trial, folder: Path, deadline: float) -> tuple[int | None, str]:
    """Runs the job; returns its exit status, None if it hangs, and its output."""
    command = mpirun_command(trial.workers + trial.servers)
    command[1:1] = ULFM
    options = {"folder": folder, "servers": trial.servers, "steps": STEPS, "mode": trial.mode, "pull": trial.pull}
    options |= {
        "pull-by": trial.pull_by,
        "density": DENSITY,
        "pause": PAUSE,
        "timeout": deadline / 3,
        "kill": trial.rank,
        "at": trial.at,
    }
    command += [sys.executable, str(HERE / "jobs" / "small.py")]
    command += [word for k, v in options.items() for word in (f"--{k}", str(v))]
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command, env=job_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(deadline)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun then ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, (folder / "output").read_text()


def landed(trial: Trial, folder: Path) -> bool:
    """Returns whether the death came before all workers had done their last step."""
    then = killed_at(folder)
    return then is not None and min(then) < STEPS


def verify(trial: Trial, folder: Path) -> str:
    """Checks the servers' shards against the workers' pushes."""
    pushed = [pushes_of(w, trial) for w in range(trial.workers)]
    acknowledged = [progress_of(folder, w)[0] for w in range(trial.workers)]
    start = torch.cat([p.detach().reshape(-1) for p in Model().parameters()])
    found = []
    for shard in range(trial.servers):
        files = sorted(folder.glob(f"shard-{shard}-at-*.pt")) or sorted(folder.glob(f"copy-{shard}-at-*.pt"))
        assert files, f"shard {shard} is nowhere"
        for file in files:
            state = torch.load(file)
            found.append(state["pushes"].get(trial.rank, STEPS))
            check_shard(trial, state, start, pushed, acknowledged)
    return f"{min(found)} of its pushes in" if trial.victim == "worker" else "all pushes in"


def check_shard(
    trial: Trial, state: dict[str, Any], start: torch.Tensor, pushed: list[torch.Tensor], acknowledged: list[int]
) -> None:
    """Checks one shard."""
    low, high = state["span"]
    counts = [state["pushes"][w] for w in range(trial.workers)]
    for worker, count in enumerate(counts):
        if worker != trial.rank:
            assert count == STEPS, f"{count} pushes of worker {worker}, which lived, of {STEPS}"
        assert acknowledged[worker] <= count <= STEPS, (
            f"{count} pushes of {worker}, {acknowledged[worker]} acknowledged"
        )
    here = [p[:, low:high].double() for p in pushed]
    if trial.mode == "sync":
        rounds = [[here[w][r] for w in range(trial.workers) if r < counts[w]] for r in range(STEPS)]
        expected = sum(torch.stack(r).sum(0) / len(r) for r in rounds)
        sizes: dict[int, int] = {}
        for r in rounds:
            sizes[len(r)] = sizes.get(len(r), 0) + 1
        assert state["averaged"] == sizes, f"rounds of {state['averaged']}, expected {sizes}"
        assert state["version"] == STEPS
    else:
        expected = sum(h[:c].sum(0) for h, c in zip(here, counts, strict=True)) / trial.workers
        assert state["version"] == sum(counts)
    applied = start[low:high].double() - state["values"].double()
    worst = float((applied - expected).abs().max())
    assert worst < 1e-4, f"the applied updates differ from the pushed ones by {worst}"


def pushes_of(worker: int, trial: Trial, rank: int | None = None, steps: range = range(STEPS)) -> torch.Tensor:
    """Computes the pushes of a worker in these steps, shape (len(steps), NUMEL)."""
    layout = ModelLayout.of(Model())
    out = torch.zeros(len(steps), NUMEL, dtype=torch.float32)
    rank = worker if rank is None else rank
    config = SparseConfig.of(TopK(DENSITY), {})
    for shard in range(trial.servers):
        spec = layout.shard(shard, trial.servers)
        part = Part(spec, config, (rank, trial.workers + trial.servers), clip=1.0, arena=Arena())
        assert part.bucket.residual is not None
        for row, step in enumerate(steps):
            grad = gradient(worker, step, NUMEL)[spec.start : spec.end].clone()
            whole = part.bucket.residual + grad
            taken = part.take(grad, step)
            part.encode(taken, step)
            part.commit(taken)
            out[row, spec.start : spec.end] = whole - part.bucket.residual
    return out


def grid() -> list[Trial]:
    """Returns trials of all supported numbers of servers and workers, without a death, with a worker's, a server's."""
    drawn = []
    for servers in (1, 2, 4):
        for workers in range(1, 7):
            victims = ["nobody"] + ["worker"] * (workers > 1) + ["server"] * (servers > 1)
            drawn += [Trial.draw(f"grid {servers} x {workers}", v, workers, servers) for v in victims]
    return drawn


def summary(results: Sequence[Result]) -> Table:
    """Returns the counts, by victim and in total."""
    table = Table("killed", *("runs", "landed", "late", *OUTCOMES, "s a run"))
    groups = [(v, [r for r in results if r.trial.victim == v]) for v in VICTIMS]
    for name, group in [*((v, g) for v, g in groups if g), ("in all", list(results))]:
        deaths = [r for r in group if r.trial.victim != "nobody"]
        outcomes = [r.outcome for r in group]
        counts = [len(group), sum(r.landed for r in deaths), sum(not r.landed for r in deaths)]
        counts += [outcomes.count(o) for o in OUTCOMES]
        mean = sum(r.seconds for r in group) / max(1, len(group))
        table.add_row(name, *map(str, counts), f"{mean:.1f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=100, help="trials in which a worker dies")
    parser.add_argument("--servers", type=int, default=30, help="trials in which a server dies")
    parser.add_argument("--grid", action="store_true", help="all numbers of servers and workers in place of these")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for a job; more on a busy machine")
    parser.add_argument("--seed", type=int, default=1, help="from which all trials are drawn")
    parser.add_argument("--first", type=int, default=1, help="number of the first trial, to go on where a run ended")
    parser.add_argument("--jobs", type=int, default=2, help="at the same time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = {"worker": options.workers, "server": options.servers}
    trials = [
        Trial.draw(f"{options.seed}-{n}", victim)
        for victim, count in numbers.items()
        for n in range(options.first, options.first + count)
    ]
    trials = grid()[options.first - 1 :] if options.grid else trials
    results, began = [], time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda trial: run(trial, options.deadline), trials):
            results.append(result)
            late = "" if result.landed or result.trial.victim == "nobody" else "; the kill came late"
            print(f"{result.trial}: {result.outcome}: {result.said}{late} ({result.seconds:.1f} s)", flush=True)
    Console(width=100).print(summary(results))
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s, {seconds / max(1, len(results)):.1f} s a run with {options.jobs} at the same time")
    return 1 if any(r.outcome != "finished" for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
