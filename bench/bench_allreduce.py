"""Our dense allreduce against Gloo's and Open MPI's own, interleaved in one run.

    mpirun --oversubscribe --bind-to none -n 2 python bench/bench_allreduce.py [--json FILE] [--seconds 20]

Every round runs each contender once, right after a barrier, so that all meet the same load; of many short rounds the
best and the median are kept. The ratio is ours over the faster of Gloo and Open MPI (below 1: ours is faster).
Ours goes through the engine, as in training, so the hand-over between two threads is in its time and in none of the
others'; "queue" is that hand-over alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsecomm.collectives import (
    DenseSum,
    choose_dense,
    dense_allreduce,
    doubling_allreduce,
    halving_allreduce,
    ring_allreduce,
)
from sparsecomm.collectives.allreduce_costs import ring_segment
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Engine
from sparsecomm.transport.mpi import MPITransport, import_mpi
from sparsecomm.types import ValueCodec

SIZES = [1 << p for p in range(10, 29, 2)]
RIVALS = ("gloo", "mpi")


def nothing(channel: Channel) -> Generator[list[Any], None, None]:
    """A collective of no messages."""
    return
    yield


def contenders(engine: Engine, comm: Any, MPI: Any, every: bool) -> dict[str, Callable[[torch.Tensor], None]]:
    """What is compared, by name: each sums a float32 vector over all ranks, in place."""
    arena = Arena()

    def ours(algorithm: Any, wire: ValueCodec = ValueCodec.FP32, **options: Any) -> Callable[[torch.Tensor], None]:
        def run(work: torch.Tensor) -> None:
            def make(channel: Channel) -> CollectiveSteps[None]:
                return algorithm(channel, DenseSum(work, wire), arena, "bench", **options)

            engine.call("allreduce", make)

        return run

    found: dict[str, Callable[[torch.Tensor], None]] = {
        "gloo": lambda work: dist.all_reduce(work),
        "mpi": lambda work: comm.Allreduce(MPI.IN_PLACE, work.numpy()),
        "ours": ours(dense_allreduce),
        "fp16": ours(dense_allreduce, wire=ValueCodec.FP16),
        "bf16": ours(dense_allreduce, wire=ValueCodec.BF16),
        "queue": lambda work: engine.call("nothing", nothing),
    }
    if every:
        segment = ring_segment(one_host=engine.transport.one_host)
        found |= {"ring": ours(ring_allreduce, segment=segment), "halving": ours(halving_allreduce)}
        found |= {"doubling": ours(doubling_allreduce)}
    return found


def measure(
    work: torch.Tensor, runs: dict[str, Callable[[torch.Tensor], None]], comm: Any, seconds: float
) -> dict[str, list[float]]:
    """Runs all contenders in turn, for about so many seconds but at least three rounds; returns seconds by name."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    goes_on, order = True, random.Random(1)  # the same order on all ranks
    while goes_on:
        # The order changes: each leaves caches, and on a network the sockets, in some state to the next.
        names = [*runs]
        order.shuffle(names)
        for name in names:
            comm.Barrier()
            begin = time.perf_counter()
            runs[name](work)
            times[name].append(time.perf_counter() - begin)
        enough = len(times["ours"]) >= 4 and time.perf_counter() - start > seconds
        goes_on = not comm.bcast(enough, 0)
    return {name: each[1:] for name, each in times.items()}  # the first one warms up


def main() -> None:
    """Prints a line a size, and a JSON file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="for all sizes together, about")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="largest size in bytes")
    parser.add_argument("--least", type=int, default=SIZES[0], help="smallest size in bytes")
    parser.add_argument("--every", action="store_true", help="each algorithm by itself too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    MPI = import_mpi()
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    comm = MPI.COMM_WORLD
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29571")
    dist.init_process_group("gloo", rank=comm.rank, world_size=comm.size, timeout=timedelta(seconds=60))
    engine = Engine(MPITransport())
    runs = contenders(engine, comm, MPI, options.every)
    sizes = [s for s in SIZES if options.least <= s <= options.most]
    rows = []
    for size in sizes:
        times = measure(torch.zeros(size // 4), runs, comm, options.seconds / len(sizes))
        row: dict[str, Any] = {"ranks": comm.size, "bytes": size, "rounds": len(times["ours"])}
        row["algorithm"] = choose_dense(size // 4, comm.size, ValueCodec.FP32, one_host=engine.transport.one_host).value
        for kind, pick in (("best", min), ("median", statistics.median)):
            row |= {f"{name}_{kind}_s": pick(each) for name, each in times.items()}
            row[f"ratio_{kind}"] = row[f"ours_{kind}_s"] / min(row[f"{r}_{kind}_s"] for r in RIVALS)
        rows.append(row)
        if comm.rank == 0:
            shown = "  ".join(f"{n} {row[f'{n}_best_s'] * 1e6:.0f}/{row[f'{n}_median_s'] * 1e6:.0f}" for n in runs)
            print(
                f"{size:>9} B  x{row['rounds']:<4} {shown}  us  ratio {row['ratio_best']:.2f}/{row['ratio_median']:.2f}"
            )
            sys.stdout.flush()
    if comm.rank == 0:
        for kind in ("best", "median"):
            mean = math.exp(statistics.fmean(math.log(r[f"ratio_{kind}"]) for r in rows))
            print(f"geometric mean of ratios, {kind}: {mean:.3f}")
        if options.json:
            options.json.write_text(json.dumps({"rows": rows}, indent=1))
    engine.close()
    comm.Barrier()
    dist.destroy_process_group()
    MPI.Finalize()


if __name__ == "__main__":
    main()
