"""Train with a parameter server: the last ranks hold the parameters, the others push sparse gradients and pull.

    mpirun -n 3 python mpi_examples/param_server.py --servers 1 --mode async
    mpirun --with-ft ulfm --mca pml ob1 -n 5 python mpi_examples/param_server.py --servers 2 --kill-worker-at 40

With ``--kill-worker-at`` the last worker kills itself at that step, and the others go on. That needs ULFM, a part
of Open MPI that the second line switches on.
"""

from __future__ import annotations

import argparse
import os
import signal
from functools import partial

import torch
from library_text import load_text, random_batch
from tiny_gpt import TinyGPT

import sparsecomm as sc

MODES: dict[str, sc.ps.Mode] = {
    "sync": sc.ps.Synchronous(),  # an update averages one push of every worker
    "ssp": sc.ps.StaleSynchronous(3),  # workers run at most 3 pushes ahead of the slowest
    "async": sc.ps.Asynchronous(),  # every push is an update
}


def work(options: argparse.Namespace, rank: int, size: int) -> None:
    """Trains on one worker.

    Args:
        options: The command line.
        rank: Number of this worker, from 0.
        size: Number of workers.
    """
    torch.manual_seed(0)  # every worker must build the same model
    training, held_out = load_text()
    model = TinyGPT()
    worker = sc.ps.Worker(model, sc.TopK(density=options.density))  # fetches the servers' parameters
    for step in range(options.steps):
        if step == options.kill_worker_at and rank == size - 1:
            print(f"worker {rank} kills itself at step {step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        model.zero_grad()
        loss = model(*random_batch(training, rank, step))
        loss.backward()
        worker.step()  # pushes the gradients and pulls the parameters
        if rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: training loss {loss.item():.3f}", flush=True)
    if rank == 0:
        with torch.no_grad():
            loss = model(*random_batch(held_out, 0, batch=256))
        print(f"held-out loss {loss.item():.3f} nats per byte")
        print(f"{worker.metrics().ratio:.1f} times fewer bytes than dense, though each pull is dense here")


def main() -> None:
    """Makes this rank a worker or a server until training has ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="updates (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.05, help="share of a gradient pushed (default %(default)s)")
    parser.add_argument("--servers", type=int, default=1, help="ranks that serve (default %(default)s)")
    parser.add_argument("--mode", choices=tuple(MODES), default="sync", help="(default %(default)s)")
    parser.add_argument("--kill-worker-at", type=int, metavar="STEP", help="the last worker dies there; needs ULFM")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the ranks share this machine's cores
    sc.ps.run(
        partial(work, options),
        servers=options.servers,
        mode=MODES[options.mode],
        optimizer=lambda shard: torch.optim.AdamW(shard, lr=2e-3),
        fault_tolerant=None if options.kill_worker_at is None else True,
    )


if __name__ == "__main__":
    main()
