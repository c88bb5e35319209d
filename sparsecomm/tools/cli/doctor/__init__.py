"""`sparsecomm doctor`: describes the installation, lists its problems, and gives a command that fixes each.

`collect` gathers a `Report`, `checks` finds its problems, `render` prints it. Code that may crash or hang runs in a
child process (`probe`).
"""

from __future__ import annotations

import json
import socket
import sys
import time

from sparsecomm.tools.cli.doctor.child import Probe

__all__ = ["run"]

_GRACE = 10.0  # seconds that other ranks wait longer than rank 0, because the launcher may end the job when one exits


def run(*, as_json: bool, seconds: float) -> int:
    """Examines this installation and, under a launcher, this job; rank 0 prints. Collective under a launcher.

    Args:
        as_json: Whether to print one JSON object (docs/doctor.md) instead of a table.
        seconds: Seconds in which MPI must start and the ranks must meet.

    Returns:
        The exit code: 1 if there is a problem of level "error". Always 0 on ranks other than 0.
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
    """Meets the other ranks; prints only if this rank failed, because rank 0 cannot know that."""
    start = time.monotonic()
    said = probe.finish()
    problem = said.get("failed", {}).get("problem") or probe.problem
    if problem and "world" not in said:
        print(f"sparsecomm doctor, rank {rank} on {socket.gethostname()}: {problem}", file=sys.stderr, flush=True)
        # If this rank exited now, mpirun would end the job before rank 0 gives up waiting and prints its report.
        time.sleep(max(0.0, seconds - (time.monotonic() - start)))
    probe.close()
