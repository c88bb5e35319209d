"""The child process in which doctor calls everything that may crash or hang: MPI, the launcher's world, UCX.

`python -m sparsecomm.tools.cli.doctor.probe solo|mpi|torch SECONDS` prints one JSON object per line, as soon as it is
known, so that the parent sees how far a child came before it died. The keys are "stage" and the facts of that stage.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import signal
import socket
import sys
from datetime import timedelta
from typing import Any

import numpy as np

from sparsecomm.launch import detect
from sparsecomm.tools.cli.doctor.ucx import loaded_library, query_ucx

__all__ = ["identify", "main"]

_NOTE_BYTES = 4096  # size of a rank's description of itself, JSON padded with blanks
_THREAD_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
_PR_SET_PDEATHSIG = 1


def identify(text: str) -> tuple[str, str]:
    """Returns the family and version of an MPI, given the version text of its library or its mpirun."""
    for family, mark in (("Open MPI", "Open MPI"), ("Intel MPI", r"Intel\(R\) MPI"), ("MPICH", "MPICH|HYDRA")):
        if re.search(mark, text):
            number = re.search(r"(?<![\w.])v?(\d+\.\d[\w.]*)", text)
            return family, number.group(1).rstrip(".") if number else ""
    return "unknown", ""


def main(mode: str, seconds: float) -> None:
    """Runs the probes of a mode and prints their facts."""
    _die_with_parent()
    if mode == "torch":
        _probe_torch_world(seconds)
        return
    _probe_mpi(world=mode == "mpi")
    if mode == "solo" or detect().rank == 0:
        _say("ucx", **query_ucx())


def _say(stage: str, **facts: Any) -> None:
    print(json.dumps({"stage": stage, **facts}), flush=True)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _probe_mpi(*, world: bool) -> None:
    """Loads and initializes MPI. With `world` it also meets the other ranks and is collective."""
    from sparsecomm.errors import LaunchError
    from sparsecomm.transport.mpi import import_mpi

    try:
        MPI = import_mpi()
    except LaunchError as error:
        _say("failed", problem=" ".join(str(error.__cause__ or error).split()))
        return
    family, version = identify(MPI.Get_library_version())
    standard = "{}.{}".format(*MPI.Get_version())
    path = loaded_library("libmpi.so")
    _say("library", family=family, version=version, standard=standard, library=path)
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    level = _THREAD_LEVELS[
        (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE).index(MPI.Query_thread())
    ]
    _say("initialized", thread_level=level, pml=_pml(path), cuda_aware=_cuda_aware(path))
    if world:
        comm = MPI.COMM_WORLD
        size = comm.Get_size()
        notes = np.empty((size, _NOTE_BYTES), dtype=np.uint8)
        comm.Allgather(_note(comm.Get_rank(), f"{family} {version}"), notes)
        _say("world", met=size, ranks=[json.loads(row.tobytes()) for row in notes])
    MPI.Finalize()


def _probe_torch_world(seconds: float) -> None:
    """Meets the other ranks over Gloo, at the address in torch's environment variables. Collective."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    note = torch.from_numpy(_note(dist.get_rank(), ""))
    notes = [torch.empty_like(note) for _ in range(dist.get_world_size())]
    dist.all_gather(notes, note)
    _say("world", met=len(notes), ranks=[json.loads(row.numpy().tobytes()) for row in notes])
    dist.destroy_process_group()


def _note(rank: int, mpi: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns this rank's description of itself (`report.Rank`) as JSON, uint8, shape (_NOTE_BYTES,)."""
    import torch

    import sparsecomm
    from sparsecomm import kernels
    from sparsecomm.errors import ConfigError

    try:
        path = kernels.current_path()
    except ConfigError:
        path = "unusable"
    facts = {
        "rank": rank,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "sparsecomm": sparsecomm.__version__,
        "torch": torch.__version__,
        "mpi": mpi,
        "kernels": path,
        "threads": torch.get_num_threads(),
        "cpus": f"{sum(1 << c for c in os.sched_getaffinity(0)):x}",
    }
    return np.frombuffer(json.dumps(facts).encode().ljust(_NOTE_BYTES), dtype=np.uint8).copy()


def _pml(path: str | None) -> str | None:
    """Returns the messaging layer that Open MPI selected, read from the library's memory; None for other MPIs."""
    try:
        table = (ctypes.c_char * 256).in_dll(ctypes.CDLL(path), "mca_pml_base_selected_component")
    except (OSError, ValueError):
        return None
    # mca_base_component_2_1_0_t: int[3], char project[16], int[3], char type[32], int[3], char name[64]
    if table.raw[40:44] != b"pml\0":
        return None
    return table.raw[84:148].split(b"\0")[0].decode(errors="replace") or None


def _cuda_aware(path: str | None) -> bool | None:
    try:
        return bool(ctypes.CDLL(path).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return None


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
