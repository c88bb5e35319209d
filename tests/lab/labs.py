"""Helpers of the tests of labs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import job_environment

from sparsecomm.tools.lab.teardown import ROOT

JOBS = Path(__file__).parent / "jobs"


def machine(name: str) -> list[str]:
    """Returns the machine's own interfaces and named namespaces whose names could belong to a lab."""
    commands = (["ip", "-br", "link"], ["ip", "netns", "list"])
    said = [subprocess.run(c, capture_output=True, text=True, check=True, timeout=30).stdout for c in commands]
    ours = re.compile(rf"(br|v|veth|eth|switch|{name})[-a-z0-9]*\b.*")
    return [line for text in said for line in text.splitlines() if ours.match(line)]


def gone(name: str) -> bool:
    """Returns whether nothing of a lab is left, after waiting for up to 15 seconds."""
    return until(lambda: not (ROOT / name).exists() and not list(ROOT.glob(f".{name}.*")), 15.0)


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """Waits for a condition; returns whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Forks:
    """A process that runs Python code in forks of itself (jobs/forks.py)."""

    def __init__(self) -> None:
        command = [sys.executable, str(JOBS / "forks.py")]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=job_environment())
        self._folder = tempfile.TemporaryDirectory()

    def start(self, code: str) -> Fork:
        """Starts a process that runs this code, in which `Lab`, `app` and `os` are defined."""
        output = Path(tempfile.mkstemp(dir=self._folder.name)[1])
        return Fork(self.ask(code=code, output=str(output)), output, self)

    def ask(self, **request: Any) -> int:
        """Sends a request and returns the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the server."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
        self._folder.cleanup()


@dataclass(frozen=True)
class Fork:
    """A process that runs code."""

    pid: int
    output: Path
    server: Forks

    def wait(self) -> int:
        """Waits for the process to end; returns its exit code, negative for a signal."""
        return self.server.ask(wait=self.pid)
