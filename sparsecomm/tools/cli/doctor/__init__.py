"""`sparsecomm doctor`: what is there, what is wrong, and the line that fixes it.

`collect` gathers a `Report`, `checks` judges it, `render` shows it. What may crash or hang runs in a child (`probe`).
"""

from __future__ import annotations

import json
import socket
import sys
import time

from sparsecomm.tools.cli.doctor.child import Probe

__all__ = ["run"]

_GRACE = 10.0  # seconds other ranks wait longer than rank 0: when one leaves, the launcher may end the job


def run(*, as_json: bool, seconds: float) -> int:
    """Examines this installation and, under a launcher, this job; rank 0 prints. Collective under a launcher.

    Args:
        as_json: whether to print one JSON object (docs/doctor.md) instead of a table.
        seconds: how long MPI may take to start and the ranks to meet.

    Returns:
        The exit code: 1 if something is wrong at level "error". On other ranks than 0 always 0.
    """
    from sparsecomm.tools.cli.doctor.collect import collect, launch_facts, probe_mode

    launch = launch_facts()
    if launch.rank != 0:
        _follow(Probe(probe_mode(launch), seconds + _GRACE), launch.rank, seconds + _GRACE)
        return 0
    probe = Probe(probe_mode(launch), seconds)
    from sparsecomm.tools.cli.doctor.checks import judged

    report = judged(collect(launch, probe, seconds))
    if as_json:
        print(json.dumps(report.as_json(), indent=2), flush=True)
    else:
        from rich.console import Console

        from sparsecomm.tools.cli.doctor.render import render
        from sparsecomm.tools.cli.output import on_terminal

        render(report, Console() if on_terminal() else Console(width=120, force_terminal=False))
    sys.stdout.flush()
    probe.close()
    return 0 if report.ok else 1


def _follow(probe: Probe, rank: int, seconds: float) -> None:
    """Takes part in the meeting of the ranks; silent unless this rank failed, which rank 0 cannot know."""
    start = time.monotonic()
    said = probe.finish()
    problem = said.get("failed", {}).get("problem") or probe.problem
    if problem and "world" not in said:
        print(f"sparsecomm doctor, rank {rank} on {socket.gethostname()}: {problem}", file=sys.stderr, flush=True)
        # Leaving now would make mpirun end the job before rank 0 has given up waiting and shown its report.
        time.sleep(max(0.0, seconds - (time.monotonic() - start)))
    probe.close()
