"""Sharded and model-parallel training over the backend; the argument says which. Prints "ok" and the rank."""

from __future__ import annotations

import copy
import sys
import tempfile

import torch
import torch.distributed as dist
from checks import run_checks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import sparsecomm  # noqa: F401

STEPS = 4


def model() -> nn.Module:
    """The same on all ranks. 24 features divide by 1 to 4 ranks."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24))


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(100 * step + rank))


def trained_alone(*, together: bool) -> nn.Module:
    """One process that averages the gradients of all ranks' batches, or of one batch that all share."""
    alone = model()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9)
    size = 1 if together else dist.get_world_size()
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(size):
            (alone(batch(step, rank)).square().mean() / size).backward()
        optimizer.step()
    return alone


def train(ours: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Trains on the batches of a rank."""
    for step in range(STEPS):
        optimizer.zero_grad()
        ours(batch(step, rank)).square().mean().backward()
        optimizer.step()


def compare(found: dict[str, torch.Tensor], expected: nn.Module) -> None:
    for name, p in expected.named_parameters():
        tensor = found[name]
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        torch.testing.assert_close(whole.detach(), p.detach(), rtol=1e-4, atol=1e-6)


def fsdp2() -> None:
    """fully_shard trains as one process does."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = model()
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizer = torch.optim.SGD(sharded.parameters(), 0.1, momentum=0.9)
    train(sharded, optimizer, dist.get_rank())
    compare(dict(sharded.named_parameters()), trained_alone(together=False))


def tensor_parallel() -> None:
    """A column-wise and a row-wise layer train as one process does."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.SGD(split.parameters(), 0.1, momentum=0.9, foreach=False)
    train(split, optimizer, 0)
    compare(dict(split.named_parameters()), trained_alone(together=True))


def zero() -> None:
    """ZeroRedundancyOptimizer under DDP trains as one process does."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ddp = DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(ddp, optimizer, dist.get_rank())
    compare(dict(ddp.module.named_parameters()), trained_alone(together=False))


def checkpoint() -> None:
    """A distributed checkpoint of a sharded model is saved and loaded."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    first, second = model(), model()
    plain = copy.deepcopy(first)
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    for one in (first, second):
        fully_shard(one, mesh=mesh)
    folder = [tempfile.mkdtemp(prefix="sparsecomm-dcp-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    dcp.save(first.state_dict(), checkpoint_id=folder[0])
    state = second.state_dict()
    dcp.load(state, checkpoint_id=folder[0])
    second.load_state_dict(state)
    compare(dict(second.named_parameters()), plain)


def mesh() -> None:
    """Two dimensions: FSDP2 with replicas (HSDP), dense."""
    from torch.distributed.fsdp import fully_shard

    rows = 2 if dist.get_world_size() % 2 == 0 else 1
    grid = init_device_mesh("cpu", (rows, dist.get_world_size() // rows), mesh_dim_names=("replica", "shard"))
    sharded = model()
    fully_shard(sharded, mesh=grid)
    optimizer = torch.optim.SGD(sharded.parameters(), 0.1, momentum=0.9)
    train(sharded, optimizer, dist.get_rank())
    compare(dict(sharded.named_parameters()), trained_alone(together=False))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("sparsecomm")
    run_checks(globals(), sys.argv[1:])
    dist.destroy_process_group()
