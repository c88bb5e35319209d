"""A rank leaves in the middle of training, in every way and under every launcher: the others end at once and say why.

The short form takes some ways under each launcher. SPARSECOMM_TEST_FAULTS=all (`make faults`) takes all of them.
"""

from __future__ import annotations

import os
import re
import sys
from itertools import product

import pytest
from helpers import JOBS, Job, mpirun_command, run_job

pytestmark = pytest.mark.slow

LEAVE = JOBS / "leave.py"
MOST_SECONDS = 10.0
BY_STATUS = r"RankLeft: bucket 0 of step 5: rank 1 has left: it exited with status 3 after bucket 0 of step 4"
BY_ERROR = r"RankLeft: bucket 0 of step 5: rank 1 has left: it failed with ValueError: the dog ate the batch after"
ENDED = r"RankLeft: bucket 0 of step 5: rank 1 has left: it ended normally after bucket 0 of step 4, .*Join"
WAYS = {
    "return_from_script": ENDED,
    "exit_main": BY_STATUS,
    "exit_builtin": BY_STATUS,
    "raise_exit": BY_STATUS,
    "exit_inside": BY_STATUS,
    "exit_by_own_class": BY_STATUS,
    "before_the_first_step": r"rank 1 has left: it exited with status 3 before its first exchange",
    "raise_at_length": "rank 1 has left: it failed with ValueError: \U0001f600",
    "raise_without_words": "rank 1 has left: it failed with Mute, which cannot be printed",
    "raise_past_the_hooks": "rank 1 has left: it was ended by an exception",
    "exit_with_words": r"rank 1 has left: it exited with status 1",
    "raise_error": BY_ERROR,
    "caught_exit": r"rank 1 has left: it failed with KeyboardInterrupt",
    "thread": r"rank 1 has left: it failed in a thread with ValueError: the dog ate the batch",
    "end_at_once": r"rank 1 has left: it called os\._exit\(3\) after bucket 0 of step 4",
    "end_at_once_without_error": r"rank 1 has left: it called os\._exit\(0\) after bucket 0 of step 4",
    "kill": "its process has died",
    "terminate": "its process has died",
    "crash": "its process has died",
}
"""What the others say of each way."""
SUDDEN = {"kill", "terminate", "crash"}
"""Ways in which a rank can say nothing. The launcher may end the others before they notice."""
SAID_ITSELF = r"sparsecomm: rank 1 of 3 (exited with|failed with|failed in a thread|was ended|called os\._exit)"
"""Under torchrun, which may end the others when rank 1 has ended and before they know."""
SAID_BY_LAUNCHER = {
    "mpirun": r"process rank 1 .*(on\s+signal|exiting)|process rank 1",
    "torchrun": r"rank\s*: 1|local_rank: 1|Signal \d+|RankLeft|receive of .* from rank 1 failed",
}
SHORT = {
    ("mpirun", "allgather", "return_from_script"),
    ("mpirun", "allgather", "exit_main"),
    ("mpirun", "allgather", "thread"),
    ("mpirun", "allgather", "raise_at_length"),
    ("mpirun", "native", "return_from_script"),
    ("mpirun", "native", "raise_error"),
    ("ulfm", "allgather", "raise_exit"),
    ("ulfm", "allgather", "end_at_once"),
    ("ulfm", "allgather", "kill"),
    ("torchrun", "allgather", "return_from_script"),
}
LAUNCHERS = ("mpirun", "ulfm", "torchrun")
COLLECTIVES = ("allgather", "native")
CASES = [*product(LAUNCHERS, COLLECTIVES, WAYS)]
if os.environ.get("SPARSECOMM_TEST_FAULTS") != "all":
    CASES = [case for case in CASES if case in SHORT]


def launch_line(launcher: str, ranks: int) -> list[str]:
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line = mpirun_command(ranks)
    if launcher == "ulfm":
        if "--oversubscribe" not in line:
            pytest.skip("ULFM is Open MPI's")
        line[1:1] = ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
    return [*line, sys.executable]


def seconds_to_end(job: Job) -> float:
    """Seconds from the moment at which rank 1 left to the end of the job."""
    left = re.search(r"leaving at ([\d.]+)", job.out)
    assert left is not None, job
    return job.ended - float(left[1])


@pytest.mark.parametrize(("launcher", "collective", "way"), CASES, ids=lambda value: str(value))
def test_the_others_end_and_say_why(launcher: str, collective: str, way: str) -> None:
    job = run_job([*launch_line(launcher, 3), LEAVE, collective, way], deadline=120.0)
    assert job.code != 0, job
    said = WAYS[way]
    if way in SUDDEN and launcher != "ulfm":
        said = SAID_BY_LAUNCHER[launcher]
    elif launcher == "torchrun":
        said = f"{said}|{SAID_ITSELF}"
    assert re.search(said, job.err), job
    assert seconds_to_end(job) < MOST_SECONDS, job
    if launcher == "mpirun" and said is BY_STATUS:
        assert job.code == 3, job
