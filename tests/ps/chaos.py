"""Kills ranks of small parameter-server jobs at random moments and holds the survivors to what must be true.

    python tests/ps/chaos.py --workers 100 --servers 30 --seed 1

Each trial is one mpirun under ULFM, in which one rank SIGKILLs itself at a moment drawn from its seed. The job must end
with status 0. Then all pushes are computed once more: every shard must be there, and hold exactly the updates that
survivors pushed, and of a dead worker at least those that were acknowledged.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "jobs"), str(HERE.parent), str(HERE.parents[1])]

from helpers import job_environment, mpirun_command  # noqa: E402
from small import NUMEL, Model, gradient  # noqa: E402

from sparsecomm import TopK  # noqa: E402
from sparsecomm.arena import Arena  # noqa: E402
from sparsecomm.config import SparseConfig  # noqa: E402
from sparsecomm.ps.part import Part  # noqa: E402
from sparsecomm.ps.sharding import ModelLayout  # noqa: E402

ULFM = ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
STEPS = 30
DENSITY = 0.1
PAUSE = 0.02
DEADLINE = 150.0  # seconds for a whole job, most of which is starting Python


@dataclass(frozen=True)
class Trial:
    """One job and one death."""

    seed: int
    victim: str
    workers: int
    servers: int
    mode: str
    pull: float
    rank: int
    after: float

    @classmethod
    def draw(cls, seed: int, victim: str, *, small: bool = False) -> Trial:
        """Draws all from a seed; small: with as few ranks as there can be."""
        r = random.Random(f"{victim} {seed}")
        workers, servers = r.choice([2, 3]), r.choice([1, 2, 3]) if victim == "worker" else r.choice([2, 3])
        if small:
            workers, servers = 2, 1 if victim == "worker" else 2
        rank = r.randrange(workers) if victim == "worker" else workers + r.randrange(servers)
        mode, pull = r.choice(["sync", "ssp", "async"]), r.choice([0.0, 0.3])
        return cls(seed, victim, workers, servers, mode, pull, rank, r.uniform(0.0, 1.5 + STEPS * PAUSE))


def run(trial: Trial, deadline: float = DEADLINE) -> str:
    """Runs a trial; returns what happened.

    Raises:
        AssertionError: if it does not end well.
    """
    with tempfile.TemporaryDirectory(prefix="sparsecomm-chaos-") as name:
        folder = Path(name)
        command = mpirun_command(trial.workers + trial.servers)
        command[1:1] = ULFM
        options = {"folder": folder, "servers": trial.servers, "steps": STEPS, "mode": trial.mode, "pull": trial.pull}
        options |= {
            "density": DENSITY,
            "kill": trial.rank,
            "after": trial.after,
            "pause": PAUSE,
            "timeout": DEADLINE / 3,
        }
        command += [sys.executable, str(HERE / "jobs" / "small.py")]
        command += [word for k, v in options.items() for word in (f"--{k}", str(v))]
        with (folder / "output").open("w+") as output:
            process = subprocess.Popen(command, env=job_environment(), stdout=output, stderr=subprocess.STDOUT)
            try:
                code = process.wait(deadline)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait(30)
                code = None
        said = (folder / "output").read_text()
        assert code == 0, f"{'hangs' if code is None else f'exit status {code}'}\n{said}"
        return verify(trial, folder)


def verify(trial: Trial, folder: Path) -> str:
    """Holds what the servers have to what the workers pushed."""
    pushed = [pushes_of(w, trial) for w in range(trial.workers)]
    acknowledged = [acknowledged_of(folder / f"worker-{w}.log") for w in range(trial.workers)]
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


def acknowledged_of(log: Path) -> int:
    """Returns how many of a worker's pushes were acknowledged, as it knew; it may have died before it began."""
    return int(np.fromfile(log, np.int64)[0]) if log.exists() else 0


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
    assert worst < 1e-4, f"what was applied differs from what was pushed by {worst}"


def pushes_of(worker: int, trial: Trial) -> torch.Tensor:
    """Computes what a worker pushes: shape (STEPS, NUMEL)."""
    layout = ModelLayout.of(Model())
    out = torch.zeros(STEPS, NUMEL)
    config = SparseConfig.of(TopK(DENSITY), {})
    for shard in range(trial.servers):
        spec = layout.shard(shard, trial.servers)
        part = Part(spec, config, (worker, trial.workers + trial.servers), clip=1.0, arena=Arena())
        assert part.bucket.residual is not None
        for step in range(STEPS):
            grad = gradient(worker, step, NUMEL)[spec.start : spec.end].clone()
            whole = part.bucket.residual + grad
            part.encode(part.take(grad, step), False, step)
            out[step, spec.start : spec.end] = whole - part.bucket.residual
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=100, help="trials in which a worker dies")
    parser.add_argument("--servers", type=int, default=30, help="trials in which a server dies")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for a job; more on a busy machine")
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; each next one has the next")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for victim, trials in (("worker", options.workers), ("server", options.servers)):
        for seed in range(options.seed, options.seed + trials):
            trial, began = Trial.draw(seed, victim), time.monotonic()
            try:
                result = run(trial, options.deadline)
            except AssertionError as error:
                failed += 1
                result = f"FAILED: {error}"
            print(f"{trial}: {result} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{failed} of {options.workers + options.servers} trials failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
