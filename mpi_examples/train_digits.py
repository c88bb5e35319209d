"""Train a CNN on handwritten digits with density warm-up: the first steps send more of the gradient.

    mpirun -n 2 python mpi_examples/train_digits.py --steps 300 --density 0.01

The 1,797 images come with scikit-learn (``pip install 'sparsecomm[demo]'``); nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

TRAINING_IMAGES = 1297  # the other 500 are test images
BATCH = 16


def load_digits() -> tuple[Tensor, Tensor]:
    """Returns the images, float32 ``(1797, 1, 8, 8)`` in [0, 1], and their classes, int64 ``(1797,)``, shuffled."""
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    return images[order], torch.tensor(data.target)[order]


def make_cnn() -> nn.Sequential:
    """Returns a CNN of 85,066 parameters that maps ``(batch, 1, 8, 8)`` to the scores of 10 classes."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def main() -> None:
    """Trains, and prints the accuracy and the bytes saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="updates (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.01, help="share of the gradient sent (default %(default)s)")
    options = parser.parse_args()

    world = sc.init()
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)
    images, classes = load_digits()
    model = make_cnn()

    # Early gradients change quickly, and a small density would hold them back for too long. The density falls from 25%
    # to the final one over the first third of the run.
    density = sc.Geometric(max(0.25, options.density), options.density, max(1, options.steps // 3))
    ddp = DistributedDataParallel(model)
    state = sc.SparseState(sc.TopK(density), collective="allgather")
    ddp.register_comm_hook(state, sc.sparse_hook)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=3e-3)

    generator = torch.Generator().manual_seed(1 + world.rank)  # every rank draws other images
    for step in range(options.steps):
        chosen = torch.randint(TRAINING_IMAGES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(images[chosen]), classes[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if world.rank == 0 and (step + 1) % 50 == 0:
            sent = state.last_step()
            print(f"step {step + 1}: loss {loss.item():.3f}, density {sent.density:.4f}", flush=True)

    if world.rank == 0:
        with torch.no_grad():
            right = model(images[TRAINING_IMAGES:]).argmax(1) == classes[TRAINING_IMAGES:]
        ratio = state.metrics().ratio
        print(f"{right.float().mean():.1%} of the test images right, {ratio:.1f} times fewer bytes than dense")


if __name__ == "__main__":
    main()
