"""One rank of a run of torch's own distributed tests. Started by run.py under mpirun.

All tests run in one process, each with a process group of its own. After each test the ranks tell each other through
files how it ended. After a failure anywhere all ranks end, because a test that has failed may leave anything behind;
run.py then goes on with the next test in new processes.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import sys
import threading
import time
import traceback
import unittest
from datetime import timedelta
from pathlib import Path
from typing import Any

RANK, SIZE = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
os.environ["WORLD_SIZE"], os.environ["BACKEND"] = str(SIZE), "gloo"  # selects the tests that Gloo can do on CPU

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.common_distributed import TEST_SKIPS  # noqa: E402
from torch.testing._internal.common_utils import TestCase  # noqa: E402
from torch.testing._internal.distributed import distributed_test  # noqa: E402

import sparsecomm  # noqa: E402, F401  (registers the backend)

SKIPS = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}


NAMED = ("test_get_backend",)
"""Tests that expect the backend's name. The others choose what they do by the name, and so are told Gloo's."""


class Suite(TestCase, distributed_test.DistributedTest._DistTestBase):  # type: ignore[misc, name-defined]
    """torch's tests of a backend, at one rank."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return SIZE

    @property
    def init_method(self) -> str:
        return f"file://{os.environ['TEMP_DIR']}/again-{self._testMethodName}"


def outcome_of(name: str) -> tuple[str, str]:
    """Runs one test; returns "pass", "skip" or "fail", and why."""
    result = unittest.TestResult()
    Suite(name).run(result)
    for kind in (result.failures, result.errors):
        if kind:
            ended = re.search(r"^SystemExit: (\d+)$", kind[0][1].strip(), re.MULTILINE)
            code = int(ended[1]) if ended else -1
            return ("skip", SKIPS[code]) if code in SKIPS else ("pass", "") if code == 0 else ("fail", kind[0][1])
    if result.skipped:
        return "skip", result.skipped[0][1]
    return "pass", ""


Ending = tuple[str, str]
"""How a test ended, and why."""


def told(folder: Path, number: int, mine: Ending) -> list[Ending]:
    """Tells the others how the test ended here; returns how it ended on all ranks that answer in time."""
    path = folder / f"{number}-{RANK}.tmp"
    path.write_text(json.dumps(mine))
    path.rename(path.with_suffix(".json"))
    until = time.monotonic() + 30
    found: dict[int, Ending] = {}
    while len(found) < SIZE and time.monotonic() < until:
        for rank in range(SIZE):
            other = folder / f"{number}-{rank}.json"
            if rank not in found and other.exists():
                found[rank] = tuple(json.loads(other.read_text()))
        time.sleep(0.002)
    return [found.get(rank, ("fail", f"rank {rank} did not end the test")) for rank in range(SIZE)]


def become_ours() -> None:
    """Offers our monitored barrier, to which torch admits Gloo alone."""

    def monitored_barrier(group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            return
        limit = timedelta(seconds=timeout) if isinstance(timeout, float) else timeout
        (group or dist.group.WORLD).monitored_barrier(limit, wait_all_ranks)

    dist.monitored_barrier = monitored_barrier


def start(backend: str, folder: Path, number: int) -> None:
    where: dict[str, Any] = {"init_method": "sparsecomm://"}
    if backend == "gloo":
        where = {"init_method": f"file://{folder}/start-{number}", "rank": RANK, "world_size": SIZE}
    dist.init_process_group(backend, **where)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.backend != "gloo":
        become_ours()
    sys.argv = sys.argv[:1]
    for number, name in enumerate(options.tests):
        faulthandler.dump_traceback_later(options.seconds, exit=True)
        start(options.backend, options.folder, number)
        distributed_test.BACKEND = options.backend if name in NAMED else "gloo"
        kind, why = outcome_of(name)
        everyone = told(options.folder, number, (kind, why))
        worst = min(everyone, key=lambda one: ("fail", "pass", "skip").index(one[0]))
        if RANK == 0:
            (options.folder / f"{number}.outcome").write_text(json.dumps([name, *worst]))
        if worst[0] == "fail":
            (options.folder / "over").touch()
            sys.stdout.flush()
            os._exit(0) if options.backend == "gloo" else end_at_once()
        try:
            dist.destroy_process_group()
        except Exception:
            traceback.print_exc()
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    end_at_once()


def end_at_once() -> None:
    """Ends without waiting for threads or MPI, in whatever state they are."""
    threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), 9)), daemon=True).start()
    time.sleep(5)


if __name__ == "__main__":
    main()
