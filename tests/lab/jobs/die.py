"""Kills processes that make, use or remove a lab by SIGKILL at given moments, after which nothing may be left.

Each moment runs in a forked process, so that sparsecomm is imported only once. Prints a line per moment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from sparsecomm.tools.lab import Lab, network, state, teardown
from sparsecomm.tools.lab import lab as lab_module

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]
NAME = sys.argv[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(module: Any, function: str, *, call: int, after: bool = False) -> None:
    """Replaces a function so that the process dies before (or after) this call of it; other calls are unchanged."""
    original, calls = getattr(module, function), iter(range(1, 1000))

    def replacement(*args: Any, **options: Any) -> Any:
        mine = next(calls)
        if mine == call and not after:
            die()
        result = original(*args, **options)
        if mine == call:
            die()
        return result

    setattr(module, function, replacement)


def up(persistent: bool = False) -> Lab:
    return Lab(hosts=2, rate="1gbit", name=NAME).up(persistent=persistent)


def at_command(number: int) -> Callable[[], object]:
    def moment() -> None:
        dying(network, "_run", call=number)
        up(persistent=number % 2 == 0)

    return moment


def at_time(seconds: float) -> Callable[[], object]:
    def moment() -> None:
        threading.Timer(seconds, die).start()
        with Lab(hosts=2, rate="1gbit", name=NAME):
            pass
        time.sleep(1)

    return moment


def at_removal(number: int) -> Callable[[], object]:
    def moment() -> None:
        lab = up()
        dying(teardown, "_unpin", call=number)
        lab.down()

    return moment


def before_the_state_is_written() -> None:
    dying(state.State, "create", call=1)
    up()


def after_the_state_is_written() -> None:
    dying(state.State, "create", call=1, after=True)
    up()


def before_a_lasting_lab_is_let_go() -> None:
    dying(lab_module.Lab, "_dismiss_watchdog", call=1)
    up(persistent=True)


def with_a_fork_that_lives_on() -> None:
    up()
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    die()


def with_processes_inside() -> None:
    lab = up()

    def die_when_ranks_run() -> None:
        while sum(1 for pid in teardown.inside(NAME) if "sleep" in command_of(pid)) < 2:
            time.sleep(0.01)
        die()

    threading.Thread(target=die_when_ranks_run, daemon=True).start()
    lab.mpirun(["sleep", "97"], timeout=60)


def command_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read()
    except OSError:
        return ""


MOMENTS: dict[str, Callable[[], object]] = {
    "before the state is written": before_the_state_is_written,
    "after the state is written": after_the_state_is_written,
    **{f"before command {n}": at_command(n) for n in range(1, 10)},
    **{f"after {ms} ms": at_time(ms / 1000) for ms in (7, 23, 41, 67)},
    **{f"at removal of namespace {n}": at_removal(n) for n in (1, 2, 3)},
    "before a lasting lab is let go": before_a_lasting_lab_is_let_go,
    "with a fork that lives on": with_a_fork_that_lives_on,
    "with processes inside": with_processes_inside,
}


def main() -> None:
    from labs import gone

    for name, moment in MOMENTS.items():
        pid = os.fork()
        if pid == 0:
            try:
                moment()
            finally:
                os._exit(99)  # not killed
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(f"{name}: {'killed' if killed else status}, {'gone' if gone(NAME) else 'LEFT'}", flush=True)
    left = subprocess.run(["pgrep", "-f", "^sleep 97$"], capture_output=True, text=True, check=False, timeout=30).stdout
    print(f"processes left: {left.split()}")


if __name__ == "__main__":
    main()
