"""Runs the checks of a job that its command line names. Not a job itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist


def run_checks(checks: Mapping[str, Callable[[], None]], names: Sequence[str]) -> None:
    """Runs checks one after the other on all ranks; each rank prints the name of each and its rank."""
    for name in names:
        checks[name]()
        dist.barrier()
        sys.stdout.write(f"{name} {dist.get_rank()}\n")
        sys.stdout.flush()
