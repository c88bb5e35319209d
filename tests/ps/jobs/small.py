"""A small job whose workers log their pushes, so that the servers' shards can be checked after deaths.

tests/ps/chaos.py runs it under mpirun. Every server that survives writes its shards, every worker its number of
acknowledged pushes.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparsecomm as sc

SIZES = ((37, 11), (53,), (7, 5, 3))
NUMEL = 37 * 11 + 53 + 7 * 5 * 3
START_UP = 0.15  # seconds from MPI_Init to the first step, about
MODES = {"sync": sc.ps.Synchronous(), "ssp": sc.ps.StaleSynchronous(2), "async": sc.ps.Asynchronous()}


class Model(torch.nn.Module):
    """Parameters without a forward pass; the gradients are random."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.tensors = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float32)) for s in SIZES
        )


class PlainSGD:
    """SGD with rate 1. Torch's optimizers load torch._dynamo, which takes longer than the rest of this job."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters, "lr": 1.0}]

    @torch.no_grad()
    def step(self) -> None:
        """Subtracts the gradients."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state."""


def gradient(worker: int, step: int, numel: int) -> torch.Tensor:
    """Returns the random gradient of a worker's step, flat."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * worker + step), dtype=torch.float32)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--mode", choices=MODES, default="sync")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--pull", type=float, default=0.0)
    parser.add_argument("--kill", type=int, default=-1, help="rank that kills itself")
    parser.add_argument("--at", type=float, default=0.0, help="when: steps done by the fastest worker; <1: start-up")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between steps")
    parser.add_argument("--tolerant", action="store_true", help="insist on ULFM")
    parser.add_argument("--pull-by", default="asked")
    parser.add_argument("--rendezvous", type=Path, help="folder where workers find the servers that join later")
    parser.add_argument("--join", action="store_true", help="join the job of that folder")
    parser.add_argument("--expect", type=int, default=0, help="workers that must be there before the sixth step")
    parser.add_argument("--die-at", type=int, default=-1, help="step at which one that joins kills itself")
    parser.add_argument("--timeout", type=float, default=30.0)
    return parser.parse_args()


def progress_of(folder: Path, worker: int) -> tuple[int, int]:
    """Returns a worker's acknowledged pushes and its steps so far; zeros if it has not begun."""
    path = folder / f"worker-{worker}.log"
    found = np.fromfile(path, np.int64) if path.exists() else ()
    return (int(found[0]), int(found[1])) if len(found) else (0, 0)


def killed_at(folder: Path) -> list[int] | None:
    """Returns the steps that each worker had done when a rank killed itself; None if that has not happened."""
    path = folder / "killed.json"
    done: list[int] | None = json.loads(path.read_text()) if path.exists() else None
    return done


def kill_later(options: argparse.Namespace, workers: int) -> None:
    """SIGKILLs this process at a moment of the run."""
    from mpi4py import MPI

    folder, step = options.folder, int(options.at)

    def done() -> list[int]:
        return [progress_of(folder, w)[1] for w in range(workers)]

    def kill() -> None:
        while not MPI.Is_initialized():
            time.sleep(0.001)
        began = time.monotonic()
        while max(done()) < step:
            time.sleep(0.001)
        one = START_UP if step < 1 else max(options.pause, (time.monotonic() - began) / (step + 1))
        time.sleep((options.at - step) * min(one, 0.2))
        (folder / "killed.tmp").write_text(json.dumps(done()))
        (folder / "killed.tmp").rename(folder / "killed.json")
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def train(options: argparse.Namespace, worker: int, size: int) -> None:
    """Pushes random gradients and logs the number of pushes that all servers have acknowledged."""
    model = Model()
    # A mapped file keeps its content when the process is killed.
    log = np.memmap(options.folder / f"worker-{worker}.log", np.int64, "w+", shape=(3,))
    client = sc.ps.Worker(model, sc.TopK(options.density))
    log[2] = client.clock
    for step in range(client.clock, options.steps):
        while step == 5 and not all((options.folder / f"worker-{w}.log").exists() for w in range(options.expect)):
            time.sleep(0.01)
        if options.join and step == options.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        flat, at = gradient(worker, step, NUMEL), 0
        model.zero_grad()
        losses = []
        for p in model.parameters():
            losses.append((p * flat[at : at + p.numel()].view(p.shape)).sum())
            at += p.numel()
        sum(losses, torch.zeros((), dtype=torch.float32)).backward()  # pushes begin to leave in here
        client.step()
        log[0], log[1] = client.metrics().acknowledged // options.servers, step + 1
        time.sleep(options.pause)
    if options.servers > 1 and options.steps >= 5:
        assert client.metrics().early_bytes > 0, "no push left in backward"


def save(shard: Any, path: Path) -> None:
    """Writes a shard and each worker's number of pushes."""
    state = {
        "values": shard.values,
        "averaged": shard.averaged,
        "joined": shard.joined,
        "pushes": {w: t.pushes for w, t in shard.tallies.items()},
        "span": (shard.spec.start, shard.spec.end),
        "version": shard.version,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def main() -> int:
    import mpi4py

    mpi4py.rc.initialize = False
    torch.set_num_threads(1)
    options = parse()
    faulthandler.dump_traceback_later(2 * options.timeout)  # shows where the job hangs, if it does
    if options.join:
        sc.ps.join(lambda worker, size: train(options, worker, size), options.rendezvous, timeout=options.timeout)
        return 0
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    if rank == options.kill:
        kill_later(options, int(os.environ["OMPI_COMM_WORLD_SIZE"]) - options.servers)
    out = sc.ps.run(
        lambda worker, size: train(options, worker, size),
        servers=options.servers,
        optimizer=PlainSGD,
        mode=MODES[options.mode],
        pull=sc.TopK(options.pull) if options.pull else None,
        pull_by=options.pull_by,
        fault_tolerant=True if options.tolerant else None,
        rendezvous=None if options.rendezvous is None else sc.ps.Rendezvous(options.rendezvous),
        timeout=options.timeout,
    )
    if out.server is not None:
        for kind, shards in (("shard", out.server.shards), ("copy", out.server.copies.shards)):
            for index, shard in shards.items():
                save(shard, options.folder / f"{kind}-{index}-at-{rank}.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
