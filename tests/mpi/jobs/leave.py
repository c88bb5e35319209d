"""leave.py COLLECTIVE HOW: training in which rank 1 leaves in step 5, in one of the ways in which a process can leave.

`HOW` is one of the functions below, or one of the ways at the end of the file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

LEAVER, STEP, STATUS = 1, 5, 3


class OwnExit(SystemExit):
    """Made before sc.init()."""


def exit_by_own_class() -> None:
    raise OwnExit(STATUS)


def raise_error() -> None:
    raise ValueError("the dog ate the batch")


def raise_at_length() -> None:
    """The message takes 12 bytes a character in JSON."""
    raise ValueError("\U0001f600" * 600)


def raise_without_words() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    raise Mute


def raise_past_the_hooks() -> None:
    """Other software sets a hook of its own after sc.init()."""
    sys.excepthook = lambda *args: None
    raise ValueError("the dog ate the batch")


def exit_inside() -> None:
    sys.exit(STATUS)


def exit_with_words() -> None:
    sys.exit("out of treats")


def end_at_once() -> None:
    os._exit(STATUS)


def end_at_once_without_error() -> None:
    os._exit(0)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def caught_exit() -> None:
    with contextlib.suppress(SystemExit):
        sys.exit(7)
    raise KeyboardInterrupt


def main(how: str) -> int:
    """Trains, and returns the status with which the script is to end."""
    torch.set_num_threads(1)
    world = sc.init()
    ddp = DistributedDataParallel(torch.nn.Linear(8, 4))
    ddp.register_comm_hook(sc.SparseState(sc.TopK(density=0.1), collective=sys.argv[1]), sc.sparse_hook)
    for step in range(50):
        if world.rank == LEAVER and step == (0 if how == "before_the_first_step" else STEP):
            print(f"leaving at {time.time()}", flush=True)
            inside = globals().get(how)
            if inside is None:
                return STATUS
            inside()
        ddp(torch.randn(4, 8)).sum().backward()
    return 0


def in_a_thread() -> None:
    """Trains in a thread that fails, while the main thread waits for something else."""
    threading.Thread(target=main, args=("raise_error",)).start()
    time.sleep(600)


if __name__ == "__main__":
    chosen = sys.argv[2]
    if chosen == "return_from_script":
        main(chosen)
    elif chosen == "exit_builtin":
        exit(main(chosen))
    elif chosen == "raise_exit":
        raise SystemExit(main(chosen))
    elif chosen == "thread":
        in_a_thread()
    else:
        sys.exit(main(chosen))
