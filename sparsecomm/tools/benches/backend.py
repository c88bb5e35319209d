"""`bench backend`: the collectives of torch.distributed over our backend, Gloo and MPI, on the same ranks in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import Timing, alternate, bench, meta, slowest, table, timing, verdict
from sparsecomm.transport.mpi import import_mpi

__all__ = ["print_table", "run"]

_OVER_GLOO = 1.0  # goal for the geometric mean over sizes
_OVER_MPI = 3.0  # goal for short messages
_SHORT = 1024  # bytes; longer messages have no goal against MPI
_CALL_BYTES = 1 << 18  # a sample has as many calls as move these bytes, 16 at most
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SUMS = ("all_reduce", "reduce_scatter")

Call = Callable[[], object]


@bench("backend", keys=("collective", "dtype", "nbytes", "world"), measures=("over_gloo", "over_mpi"))
def run(
    collectives: Sequence[str] = ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all"),
    sizes: Sequence[int] = (64, 1024, 16384, 262144, 4194304, 67108864),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    repeats: int = 20,
) -> dict[str, Any]:
    """Compares our torch.distributed backend with Gloo and with MPI's own calls. Run it under mpirun -n P.

    Goals: ahead of Gloo in the geometric mean over sizes; short messages within three times mpi4py's own call.

    Args:
        collectives: Collectives to time.
        sizes: Bytes of the longer of a rank's two tensors, or of its only one.
        dtypes: float32 or bfloat16. MPI has no sums in bfloat16.
        repeats: Timed rounds; a quarter of them from 4 MiB on.

    Returns:
        ``{"meta": {...}, "rows": [...]}``. A row has collective, dtype, nbytes, world, seconds, gloo_seconds and
        mpi_seconds (of the slowest rank, medians over rounds; None where there is no such call), over_gloo and over_mpi
        (median over rounds), goal and ok. Rows whose nbytes is None hold the geometric means over all sizes.

    Raises:
        ConfigError: The world has one rank, was not started by MPI's launcher, or an argument is not acceptable.
    """
    world = sc.init()
    _check(world, collectives, sizes, dtypes, repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, gloo = dist.new_group(backend="sparsecomm"), dist.new_group(backend="gloo")
    comm = import_mpi().COMM_WORLD.Dup()
    rows: list[dict[str, Any]] = []
    try:
        for name in collectives:
            for dtype in dtypes:
                found = [_row(name, dtype, nbytes, (ours, gloo, comm), repeats) for nbytes in sizes]
                rows += [*found, _mean(found)]
    finally:
        torch.set_num_threads(threads)
        comm.Free()
        for group in (ours, gloo):
            dist.destroy_process_group(group)
    return {"meta": meta() | {"world": world.size, "transport": world.transport}, "rows": rows}


def _check(
    world: sc.World, collectives: Sequence[str], sizes: Sequence[int], dtypes: Sequence[str], repeats: int
) -> None:
    if world.size < 2 or world.transport != "mpi":
        raise ConfigError(f"a world of {world.size} over {world.transport}: mpirun -n 2 sparsecomm bench backend")
    for name in collectives:
        if name not in _CALLS:
            raise ConfigError(f"collective {name!r} does not exist; known are {', '.join(_CALLS)}")
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    for nbytes in sizes:
        if nbytes < 4 * world.size:
            raise ConfigError(f"size {nbytes} is less than an element for each of {world.size} ranks")
    if repeats < 4:
        raise ConfigError(f"repeats = {repeats}: 4 at least")


def _row(name: str, dtype: str, nbytes: int, peers: tuple[Any, Any, Any], repeats: int) -> dict[str, Any]:
    """Times a collective at one size. Collective."""
    ours, gloo, comm = peers
    size = comm.Get_size()
    element = torch.empty(0, dtype=_DTYPES[dtype]).element_size()
    whole = torch.zeros(nbytes // element // size * size, dtype=_DTYPES[dtype])
    part = torch.zeros(whole.numel() // size, dtype=whole.dtype)
    torch_call, mpi_call = _CALLS[name]
    calls: dict[str, Call] = {"ours": torch_call(whole, part, ours), "gloo": torch_call(whole, part, gloo)}
    if dtype == "float32" or name not in _SUMS:
        calls["mpi"] = mpi_call(comm, whole, part)
    times = max(1, min(16, _CALL_BYTES // nbytes))
    found = _timings(calls, times, repeats if nbytes < 1 << 22 else max(4, repeats // 4))
    over_gloo = found["ours"].over(found["gloo"])
    over_mpi = found["ours"].over(found["mpi"]) if "mpi" in found else None
    goal = _OVER_MPI if nbytes <= _SHORT and over_mpi is not None else None
    return {
        "collective": name,
        "dtype": dtype,
        "nbytes": nbytes,
        "world": size,
        "seconds": found["ours"].seconds,
        "gloo_seconds": found["gloo"].seconds,
        "mpi_seconds": found["mpi"].seconds if "mpi" in found else None,
        "over_gloo": over_gloo,
        "over_mpi": over_mpi,
        "goal": goal,
        "ok": verdict(over_mpi, goal),
    }


def _timings(calls: dict[str, Call], times: int, repeats: int) -> dict[str, Timing]:
    """Times the calls in turn, each several times in a row, on the slowest rank. Collective."""

    def repeated(call: Call) -> Call:
        def several() -> None:
            for _ in range(times):
                call()

        return several

    mine = alternate({n: repeated(c) for n, c in calls.items()}, repeats=repeats, warmup=2, before=dist.barrier)
    return {n: timing(slowest([seconds / times for seconds in taken.samples])) for n, taken in mine.items()}


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the geometric means over all sizes of one collective and dtype."""

    def mean(field: str) -> float | None:
        ratios = [row[field] for row in rows if row[field]]
        return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None

    over_gloo = mean("over_gloo")
    return {key: rows[0][key] for key in ("collective", "dtype", "world")} | {
        "nbytes": None,
        "over_gloo": over_gloo,
        "over_mpi": mean("over_mpi"),
        "goal": _OVER_GLOO,
        "ok": verdict(over_gloo, _OVER_GLOO),
    }


# --- the calls: each takes the whole vector, a part of it, and the group or communicator ------------------------------


def _bytes_of(MPI: Any, tensor: torch.Tensor) -> list[Any]:
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE]


def _floats_of(MPI: Any, tensor: torch.Tensor) -> list[Any]:
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.FLOAT]


def _mpi_all_reduce(comm: Any, whole: torch.Tensor, part: torch.Tensor) -> Call:
    MPI = import_mpi()
    data = _floats_of(MPI, whole)
    return lambda: comm.Allreduce(MPI.IN_PLACE, data)


def _mpi_reduce_scatter(comm: Any, whole: torch.Tensor, part: torch.Tensor) -> Call:
    MPI = import_mpi()
    give, take = _floats_of(MPI, whole), _floats_of(MPI, part)
    return lambda: comm.Reduce_scatter_block(give, take)


def _mpi_broadcast(comm: Any, whole: torch.Tensor, part: torch.Tensor) -> Call:
    data = _bytes_of(import_mpi(), whole)
    return lambda: comm.Bcast(data, 0)


def _mpi_all_gather(comm: Any, whole: torch.Tensor, part: torch.Tensor) -> Call:
    MPI = import_mpi()
    give, take = _bytes_of(MPI, part), _bytes_of(MPI, whole)
    return lambda: comm.Allgather(give, take)


def _mpi_all_to_all(comm: Any, whole: torch.Tensor, part: torch.Tensor) -> Call:
    MPI, out = import_mpi(), torch.empty_like(whole)
    give, take = _bytes_of(MPI, whole), _bytes_of(MPI, out)

    def call() -> torch.Tensor:
        comm.Alltoall(give, take)
        return out  # keeps the memory alive

    return call


def _torch_all_to_all(whole: torch.Tensor, part: torch.Tensor, group: Any) -> Call:
    out = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(out, whole, group=group)


_CALLS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor, Any], Call], Callable[..., Call]]] = {
    "all_reduce": (lambda whole, part, group: lambda: dist.all_reduce(whole, group=group), _mpi_all_reduce),
    "broadcast": (lambda whole, part, group: lambda: dist.broadcast(whole, 0, group=group), _mpi_broadcast),
    "all_gather": (
        lambda whole, part, group: lambda: dist.all_gather_into_tensor(whole, part, group=group),
        _mpi_all_gather,
    ),
    "reduce_scatter": (
        lambda whole, part, group: lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        _mpi_reduce_scatter,
    ),
    "all_to_all": (_torch_all_to_all, _mpi_all_to_all),
}


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a result of `run`."""
    rows = [
        row
        | {"size": f"{row['nbytes']:,}" if row["nbytes"] else "all (geo. mean)"}
        | {
            who: row[field] * 1e6 if row.get(field) else None
            for who, field in (("ours", "seconds"), ("gloo", "gloo_seconds"), ("mpi", "mpi_seconds"))
        }
        for row in result["rows"]
    ]
    columns = {
        "collective": ("collective", ""),
        "dtype": ("dtype", ""),
        "bytes": ("size", ">s"),
        "us": ("ours", ",.0f"),
        "Gloo us": ("gloo", ",.0f"),
        "MPI us": ("mpi", ",.0f"),
        "x Gloo": ("over_gloo", ".2f"),
        "x MPI": ("over_mpi", ".2f"),
        "goal": ("goal", ".0f"),
        "verdict": ("ok", ""),
    }
    info = result["meta"]
    (console or Console()).print(table(f"torch.distributed over {info['world']} ranks", rows, columns))
