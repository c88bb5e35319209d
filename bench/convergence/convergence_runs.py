"""Does the runs of a study under mpirun: keeps finished runs, continues half runs, and leaves no process behind."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO

import checkpointing
from convergence_study import Run, StudyError
from launching import launch_environment
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from run_log import LogError, RunLog

GRACE = 10.0  # seconds within which mpirun must end its ranks
STEP = re.compile(r"^step\s+(\d+)/", re.MULTILINE)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """Locks a study's folder for this process and for the runs that it starts.

    The runs inherit the lock. If the driver is killed and a run survives, the next driver finds the folder locked.

    Raises:
        StudyError: Another process holds the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(f"{out} is in use by another convergence.py, or by a run that one left behind") from error
        yield lock


def finished(run: Run) -> RunLog | None:
    """Returns the log of a run that has reached its last step, or None.

    Raises:
        LogError: The run has a log that cannot be read.
    """
    if not run.log.exists():
        return None
    log = RunLog.read(run.log)
    done = bool(log.rows) and log.rows[-1].step == run.flags["steps"] and log.rows[-1].val_loss is not None
    return log if done else None


class Runner:
    """Does runs, ``jobs`` at a time, and shows their progress.

    Args:
        launch: Returns the command that starts so many ranks of the command that follows it.
        jobs: Number of runs at a time. Each gets its share of the cores to itself: its ranks wait for each other, so
            those of another run between them would delay all of them.
        console: Console for progress and results.
        lock: File of ``locked``.
    """

    def __init__(self, launch: Callable[[int], list[str]], jobs: int, console: Console, lock: IO[str]) -> None:
        self._launch, self._jobs, self._console = launch, jobs, console
        self._lock_descriptor = lock.fileno()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run_all(self, runs: Sequence[Run]) -> dict[Path, str]:
        """Does the runs that are not finished.

        Returns:
            Reasons of the failed runs, by the path of their log.
        """
        todo = [run for run in runs if finished(run) is None]
        self._console.print(f"{len(runs)} runs, {len(runs) - len(todo)} finished before", highlight=False)
        failures: dict[Path, str] = {}
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with (
            self._stop_on_exit(),
            Progress(*columns, console=self._console, disable=not self._console.is_terminal) as bar,
        ):
            overall = bar.add_task("runs", total=len(todo))
            slots = itertools.count()
            with ThreadPoolExecutor(self._jobs, initializer=lambda: self._take_cores(next(slots))) as pool:
                futures = {pool.submit(self._one, run, bar): run for run in todo}
                try:
                    for count, future in enumerate(as_completed(futures), 1):
                        run, error = futures[future], future.result()
                        if error is not None:
                            failures[run.log] = error
                        bar.advance(overall)
                        self._say(f"[{count}/{len(todo)}] {run.title}: ", run, error)
                except BaseException:
                    self.stop()
                    pool.shutdown(cancel_futures=True)
                    raise
        return failures

    def _take_cores(self, slot: int) -> None:
        """Binds this thread, and with it the runs that it starts, to its share of the cores."""
        if self._jobs > 1 and hasattr(os, "sched_setaffinity"):  # Linux
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[slot % len(cores) :: self._jobs])

    def stop(self) -> None:
        """Ends all runs and starts no more."""
        with self._guard:
            self._stopped = True
            for process in self._processes:
                process.terminate()  # mpirun then ends its ranks

    @contextlib.contextmanager
    def _stop_on_exit(self) -> Iterator[None]:
        """Makes SIGTERM end the driver as Ctrl-C does, so that its runs are ended too."""

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _one(self, run: Run, bar: Progress) -> str | None:
        """Does one run; returns the reason if it failed, else None."""
        resume = run.checkpoints.is_dir() and checkpointing.exists(run.checkpoints)
        if not resume:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [*self._launch(run.ranks), sys.executable, *run.command(resume=resume)]
        task = bar.add_task(run.title, total=int(run.flags["steps"]))
        with run.output.open("ab") as output:
            start = output.tell()
            with self._guard:
                if self._stopped:
                    return "not started"
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=launch_environment(),
                    start_new_session=True,
                    pass_fds=(self._lock_descriptor,),
                )
                self._processes.add(process)
        try:
            status = self._wait(process, run, start, bar, task)
        finally:
            with self._guard:
                self._processes.discard(process)
            bar.remove_task(task)
        try:
            if status == 0 and finished(run) is not None:
                shutil.rmtree(run.checkpoints, ignore_errors=True)
                return None
        except LogError as error:
            return str(error)
        return _last_words(run, start, status)

    def _wait(self, process: subprocess.Popen[bytes], run: Run, start: int, bar: Progress, task: TaskID) -> int:
        ending = 0.0
        while True:
            try:
                return process.wait(0.5)
            except subprocess.TimeoutExpired:
                steps = STEP.findall(_printed(run, start))
                bar.update(task, completed=int(steps[-1]) if steps else 0)
            if self._stopped:
                ending = ending or time.monotonic()
                if time.monotonic() - ending > GRACE:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def _say(self, head: str, run: Run, error: str | None) -> None:
        if error is not None:
            self._console.print(
                f"{head}FAILED: {error} (see {run.output})", markup=False, highlight=False, soft_wrap=True
            )
            return
        log = finished(run)
        assert log is not None
        last = log.rows[-1]
        accuracy = "" if last.val_accuracy is None else f", {last.val_accuracy:.2%} right"
        self._console.print(
            f"{head}{run.flags['judge']} loss {last.val_loss:.4f}{accuracy}, {last.seconds:.0f} s of training, "
            f"{last.bytes_sent / 1e6:.1f} MB sent",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _printed(run: Run, start: int) -> str:
    """Returns the output of the present process, which begins at byte ``start`` of the file."""
    with run.output.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _last_words(run: Run, start: int, status: int) -> str:
    """Returns the script's error message, or else the exit status and the last line of output."""
    lines = [line.strip() for line in _printed(run, start).splitlines() if line.strip()]
    said = [line for line in lines if ": error" in line]
    return said[0] if said else f"status {status}" + (f" after: {lines[-1]}" if lines else "")
