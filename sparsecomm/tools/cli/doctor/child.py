"""The parent's side of `probe`: starts it, waits no longer than allowed, and keeps what it said."""

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
    """Returns what a command prints on standard output, "" if it fails, is missing or takes over 10 s."""
    # Intel's mpirun is a script that looks for its parts on PATH.
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
    """A running `probe`, in the background until `finish`.

    Args:
        mode: "solo" (MPI of this process alone), "mpi" or "torch" (meet the other ranks).
        seconds: how long it may take from now.
    """

    def __init__(self, mode: str, seconds: float) -> None:
        # Files, not pipes: nothing blocks when a library writes much, and what a killed child wrote remains.
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        command = [sys.executable, "-m", "sparsecomm.tools.cli.doctor.probe", mode, str(seconds)]
        # Launchers hand down open descriptors (PMI_FD); a rank's child needs them to become the rank in its place.
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
        """Waits for the child or the deadline.

        Afterwards `problem` says how it ended, None if well, and `timed_out` whether it did not end.

        Returns:
            What the child said, by stage.
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
                self.problem = f"the process that tried {how}" + (f", its last words: {words}" if words else "")
        said: dict[str, dict[str, Any]] = {}
        for line in self._read(self._out).splitlines():
            with contextlib.suppress(ValueError):  # a library may print, and a killed child stop in mid-line
                facts = json.loads(line)
                said[facts.pop("stage")] = facts
        return said

    def close(self) -> None:
        """Ends the child. After the report is shown: where a rank dies, the launcher may end the others."""
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
