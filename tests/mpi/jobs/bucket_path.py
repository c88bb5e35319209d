"""Lists the files of the package that one bucket enters between `sparse_hook` and its future, as JSON on rank 0.

No `from __future__ import annotations`: DDP refuses string annotations on hooks.
"""

import json
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

PACKAGE = str(Path(sc.__file__).parent) + "/"
STEPS = 5
files: dict[str, None] = {}  # in the order in which they are entered
calls: set[tuple[str, str]] = set()  # caller and callee, where both are files of the package
tracing = False


def note(frame: FrameType, event: str, _: Any) -> None:
    """Notes a call into the package."""
    name = frame.f_code.co_filename
    if not tracing or event != "call" or not name.startswith(PACKAGE):
        return
    entered = name.removeprefix(PACKAGE)
    files.setdefault(entered)
    caller = frame.f_back
    while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
        caller = caller.f_back
    if caller is not None:
        calls.add((caller.f_code.co_filename.removeprefix(PACKAGE), entered))


def hook(state: sc.SparseState, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook, its last step traced."""
    global tracing
    if state.step == STEPS - 1:
        tracing = True
        sys.setprofile(note)
    future = sc.sparse_hook(state, bucket)
    sys.setprofile(None)
    return future.then(stop)


def stop(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
    """Ends the tracing: the bucket holds its average."""
    global tracing
    tracing = False
    return future.value()


def main() -> None:
    torch.set_num_threads(1)
    threading.setprofile(note)  # for the engine's thread, which init starts
    world = sc.init()
    model = DistributedDataParallel(nn.Linear(50, 40))
    state = sc.SparseState(sc.TopK(0.1), collective="allgather")
    model.register_comm_hook(state, hook)
    for _ in range(STEPS):
        model(torch.randn(8, 50)).square().mean().backward()
    if world.rank == 0:
        print(json.dumps({"transport": world.transport, "files": list(files), "calls": sorted(calls)}))


if __name__ == "__main__":
    main()
