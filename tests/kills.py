"""Kills a rank of small jobs at random moments from their launch on. Every job must end.

    python tests/kills.py --trials 100 --seed 1
    python tests/kills.py --trials 1 --seed 1 --first 37      # trial 37 once more

A trial is a DDP or a parameter-server job under plain mpirun or under ULFM, in which one rank gets SIGKILL 0 to 10 s
after the launch. How a parameter server goes on after a death is the subject of tests/ps/chaos.py; here a job hangs or
it does not.
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
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from helpers import job_environment, mpirun_command  # noqa: E402

ULFM = ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
TOKEN = "SPARSECOMM_KILLS_TRIAL"
RANKS = 3
LATEST = 10.0  # seconds after the launch
TIMEOUT = 10.0  # SPARSECOMM_TIMEOUT
TRAINING = 12.0  # seconds
DEADLINE = LATEST + TRAINING + TIMEOUT + 40.0  # seconds for a job, most of which is starting Python on a busy machine


@dataclass(frozen=True)
class Trial:
    """One job and one death.

    Attributes:
        kind: "ddp" or "ps".
        ulfm: Whether the launcher offers ULFM.
        victim: Rank that is killed.
        at: Seconds from the launch to the death.
    """

    kind: str
    ulfm: bool
    victim: int
    at: float

    @classmethod
    def draw(cls, seed: int, number: int) -> Trial:
        """Draws a trial."""
        r = random.Random(f"{seed} {number}")
        return cls(r.choice(["ddp", "ps"]), r.random() < 0.5, r.randrange(RANKS), r.uniform(0.0, LATEST))

    def command(self, folder: Path) -> list[str]:
        """Returns the launch line."""
        line = mpirun_command(RANKS)
        line[1:1] = ULFM if self.ulfm else []
        line.append(sys.executable)
        pause = 0.05
        steps = str(int(TRAINING / pause))
        if self.kind == "ddp":
            return [*line, str(HERE / "mpi" / "jobs" / "train.py"), "--steps", steps, "--pause", str(pause)]
        options = {"folder": folder, "servers": 1, "steps": steps, "pause": pause, "timeout": TIMEOUT}
        words = [word for k, v in options.items() for word in (f"--{k}", str(v))]
        return [*line, str(HERE / "ps" / "jobs" / "small.py"), *words]


def ranks_of(token: str) -> dict[int, int]:
    """Returns the process of every rank of a trial's job that has begun."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                entries = (folder / "environ").read_bytes().split(b"\0")
                env = dict(entry.partition(b"=")[::2] for entry in entries)
                if env.get(TOKEN.encode()) == token.encode() and b"OMPI_COMM_WORLD_RANK" in env:
                    found.setdefault(int(env[b"OMPI_COMM_WORLD_RANK"]), int(folder.name))
    return found


def run(trial: Trial, deadline: float = DEADLINE) -> tuple[int | None, str]:
    """Runs a trial. Returns the job's status, None if it hung, and its output."""
    with tempfile.TemporaryDirectory(prefix="sparsecomm-kills-") as name:
        token = Path(name).name
        env = job_environment() | {TOKEN: token, "SPARSECOMM_TIMEOUT": str(TIMEOUT)}
        with (Path(name) / "output").open("w+") as output:
            began = time.monotonic()
            process = subprocess.Popen(
                trial.command(Path(name)), env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None and time.monotonic() - began < trial.at:
                    time.sleep(0.01)
                while process.poll() is None and trial.victim not in ranks_of(token):  # it has not been started yet
                    time.sleep(0.01)
                with contextlib.suppress(KeyError, ProcessLookupError):
                    os.kill(ranks_of(token)[trial.victim], signal.SIGKILL)
                code: int | None = process.wait(max(0.1, deadline - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                for pid in [*ranks_of(token).values(), process.pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
        return code, (Path(name) / "output").read_text(errors="replace")


def main() -> int:
    """Runs the trials and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    console, hung = Console(), 0
    for number in range(args.first, args.first + args.trials):
        trial = Trial.draw(args.seed, number)
        began = time.monotonic()
        code, said = run(trial)
        hung += code is None
        seconds = time.monotonic() - began
        console.print(f"{number}: {trial}: {'HUNG' if code is None else f'status {code}'} after {seconds:.0f} s")
        if code is None:
            console.print(said, markup=False)
    console.print(f"{args.trials} kills, {hung} jobs hung")
    return 1 if hung else 0


if __name__ == "__main__":
    raise SystemExit(main())
