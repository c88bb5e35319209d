"""The parent's side of `probe`: starts it, waits for a limited time, and reads its output."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from sparsecomm.launch import without_launcher

__all__ = ["Probe", "run_tool"]


def run_tool(*command: str) -> str:
    """Returns the standard output of a command; "" if the command is missing or takes over 10 s."""
    # Intel's mpirun is a script that searches PATH for its other parts.
    path = os.pathsep.join(filter(None, [os.path.dirname(command[0]), os.environ.get("PATH", os.defpath)]))
    try:
        done = subprocess.run(
            command,
            env=without_launcher() | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10.0,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


class Probe:
    """A `probe` that runs in the background until `finish`.

    Args:
        mode: "solo" (initialize MPI in this process alone), "mpi" or "torch" (meet the other ranks).
        seconds: Seconds from now after which the probe counts as hung.

    Attributes:
        problem: Why the probe did not end well; None if it did, and before `finish`.
        timed_out: Whether the probe did not end in time.
    """

    def __init__(self, mode: str, seconds: float) -> None:
        # Files rather than pipes: a library that prints a lot cannot block, and the output of a killed child remains.
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        command = [sys.executable, "-m", "sparsecomm.tools.cli.doctor.probe", mode, str(seconds)]
        # Launchers pass open descriptors to ranks (PMI_FD). The child needs them to take the place of this rank.
        self._child = subprocess.Popen(
            command,
            env=without_launcher() if mode == "solo" else None,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            close_fds=mode == "solo",
        )
        self.problem: str | None = None
        self.timed_out = False

    def finish(self) -> dict[str, dict[str, Any]]:
        """Waits for the child or the deadline, and sets `problem` and `timed_out`.

        Returns:
            The facts that the child printed, by stage.
        """
        try:
            code = self._child.wait(max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.timed_out = True
            self.problem = f"no answer within {self._seconds:g} s"
        else:
            if code:
                how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
                words = self._last_words()
                self.problem = f"the probe process {how}" + (f", its last output: {words}" if words else "")
        said: dict[str, dict[str, Any]] = {}
        for line in self._read(self._out).splitlines():
            with contextlib.suppress(ValueError):  # lines that libraries print, or that a killed child left incomplete
                facts = json.loads(line)
                said[facts.pop("stage")] = facts
        return said

    def close(self) -> None:
        """Kills the child. Call this after printing the report: when a rank dies, the launcher may end the others."""
        self._child.kill()
        self._child.wait()
        self._out.close()
        self._err.close()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._read(self._err).splitlines()]
        return next((line for line in reversed(lines) if any(c.isalpha() for c in line)), "")

    @staticmethod
    def _read(file: Any) -> str:
        file.seek(0)
        return bytes(file.read()).decode(errors="replace")
