"""A job that saves checkpoints. Worker 0 prints the version and the values that it begins and ends with, as JSON.

A server may kill itself before an update.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

import torch

import sparsecomm as sc


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--servers", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--existing", default="refuse")
    parser.add_argument("--kill", type=int, default=-1, help="rank of a server that kills itself")
    parser.add_argument("--at", type=int, default=0, help="number of its updates before")
    return parser.parse_args()


def train(options: argparse.Namespace, number: int) -> None:
    """Trains, the same in every job."""
    torch.manual_seed(1)
    model = torch.nn.Linear(6, 6, dtype=torch.float32)
    worker = sc.ps.Worker(model, sc.TopK(density=1.0), value_codec="fp32")
    ends = [(worker.versions, model.weight.tolist())]
    for step in range(worker.versions[0], options.steps):
        model.zero_grad()
        g = torch.Generator().manual_seed(10 * step + number)
        model(torch.randn(4, 6, generator=g, dtype=torch.float32)).square().mean().backward()
        worker.step()
    ends.append((worker.versions, model.weight.tolist()))
    if number == 0:
        print("ENDS", json.dumps(ends), flush=True)


class Mortal(torch.optim.Adam):
    """Adam whose process dies before an update."""

    left = -1

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Counts down, then dies."""
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        super().step(closure)


def main() -> int:
    torch.set_num_threads(1)
    options = parse()
    if int(os.environ["OMPI_COMM_WORLD_RANK"]) == options.kill:
        Mortal.left = options.at
    sc.ps.run(
        lambda number, size: train(options, number),
        servers=options.servers,
        optimizer=lambda parameters: Mortal(parameters, lr=0.1),
        checkpoints=sc.ps.Checkpoints(folder=options.folder, every=5, resume=options.resume, existing=options.existing),
        timeout=60.0,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
