"""Averages gradients by every collective and checks that nothing is lost and all ranks hold the same bits."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

import sparsecomm as sc
from sparsecomm.exchange.method import methods
from sparsecomm.tools.benches.compressors import compressor_for

STEPS = 3
ROWS, COLUMNS = 48, 65


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Returns whether all ranks hold the same bits. Collective."""
    mine = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    all_of_them: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    return len(set(all_of_them)) == 1


def check(name: str, world: sc.World) -> None:
    """Takes a few steps by one collective. Collective."""
    model = torch.nn.Linear(COLUMNS - 1, ROWS)  # one bucket of ROWS * COLUMNS elements
    compressor = compressor_for(name, 0.05)
    state = sc.SparseState(compressor, model=model, collective=name)
    given, applied = torch.zeros(ROWS * COLUMNS, dtype=torch.float64), torch.zeros(ROWS * COLUMNS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(STEPS):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        given += torch.cat([g.flatten() for g in grads]).double()
        sc.allreduce_gradients(model, state)
        average = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert same_everywhere(average), f"{name}: ranks differ"
        applied += world.size * average.double()
    saved, named = state.state_dict(), list(model.named_parameters())
    # Of a dense one, which leaves nothing over, a residual is there by name alone.
    left = [saved[f"residual.{name}"] if state.residual_norm() else torch.zeros(p.shape) for name, p in named]
    mine = torch.stack([given, torch.cat([t.flatten() for t in left]).double()])
    dist.all_reduce(mine)
    error = float((mine[0] - applied - mine[1]).abs().max())
    assert error < 1e-4 * world.size, f"{name}: {error} is lost"
    assert float(applied.abs().max()) > 0.1, f"{name}: nothing was sent"


def main() -> None:
    """Checks all."""
    world = sc.init()
    for name in methods():
        check(name, world)
    world.barrier()
    if world.rank == 0:
        print(f"{len(methods())} collectives, {world.size} ranks: nothing lost, all alike")


if __name__ == "__main__":
    main()
