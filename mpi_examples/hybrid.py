"""Split a model over some ranks, and average the gradients of each part sparsely over the copies of the model.

    mpirun -n 4 python mpi_examples/hybrid.py --tensor 2
    mpirun -n 4 python mpi_examples/hybrid.py --pipeline 2

The ranks form a grid. Those of a row hold one model: a part of every layer (``--tensor``), or some of the layers
(``--pipeline``). Those of a column hold the same part; they learn from different data and average their gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from library_text import load_text, random_batch
from tiny_gpt import Attention, Stage, TinyGPT, mean_loss
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import sparsecomm as sc

MICROBATCHES = 4  # a rank of a pipeline works on one while its neighbours work on others


class Part(NamedTuple):
    """What a rank holds of the model."""

    own: dict[str, nn.Parameter]  # the same on the ranks of a column
    shared: dict[str, nn.Parameter]  # the same on all ranks
    gradients: Callable[[Tensor, Tensor], float]  # computes and averages them; returns the loss if this rank knows it


def split_tensors(model: TinyGPT, mesh: DeviceMesh, options: sc.SparseConfig) -> tuple[Part, sc.SparseState]:
    """Gives each rank of a row a part of every layer."""
    split: dict[str, ParallelStyle] = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i, block in enumerate(model.blocks):
        block.self_attn = Attention(block.get_submodule("self_attn"))
        by_columns = ("self_attn.queries", "self_attn.keys", "self_attn.values", "linear1")
        split |= {f"blocks.{i}.{layer}": ColwiseParallel() for layer in by_columns}
        split |= {f"blocks.{i}.{layer}": RowwiseParallel() for layer in ("self_attn.out", "linear2")}
    parallelize_module(model, mesh["model"], split)

    # Every rank has the norms, the positions and some biases as a whole. Top-k among other parameters would choose
    # other elements of them on each rank of a row, whose models would then no longer fit together. So DDP leaves them
    # out, and all ranks average them together, which gives all ranks the same bits.
    whole = {name for name, p in model.named_parameters() if not is_split(p)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, whole)  # type: ignore[no-untyped-call]
    ddp = DistributedDataParallel(model, device_mesh=mesh["data"])
    state = sc.SparseState(options)
    ddp.register_comm_hook(state, sc.sparse_hook)
    named = dict(model.named_parameters())
    shared = {name: p for name, p in named.items() if name in whole}

    def gradients(inputs: Tensor, targets: Tensor) -> float:
        loss = ddp(inputs, targets)
        loss.backward()
        for work in [dist.all_reduce(p.grad, dist.ReduceOp.AVG, async_op=True) for p in shared.values()]:
            work.wait()
        return float(loss.detach())

    return Part({name: p for name, p in named.items() if name not in whole}, shared, gradients), state


def is_split(p: nn.Parameter) -> bool:
    """Returns whether each rank of a row has a part of a parameter, and not all of it."""
    return isinstance(p, DTensor) and any(placement.is_shard() for placement in p.placements)


def split_layers(model: TinyGPT, mesh: DeviceMesh, options: sc.SparseConfig) -> tuple[Part, sc.SparseState]:
    """Gives each rank of a row some of the layers. A batch goes through the row in microbatches."""
    row = mesh["model"]
    layers = Stage(model, row.get_local_rank(), row.size())
    state = sc.SparseState(options, model=layers, process_group=mesh["data"].get_group())
    stage = PipelineStage(layers, row.get_local_rank(), row.size(), torch.device("cpu"), group=row.get_group())

    def share_of_loss(scores: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(scores, targets) / MICROBATCHES

    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=share_of_loss, scale_grads=False)

    def gradients(inputs: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        schedule.step(*([inputs] if stage.is_first else []), target=targets if stage.is_last else None, losses=losses)
        sc.allreduce_gradients(layers, state)
        return float(sum(loss.detach() for loss in losses))

    return Part(dict(layers.named_parameters()), {}, gradients), state


def main() -> None:
    """Trains, and prints the loss and the bytes saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="updates (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.01, help="share of a gradient sent (default %(default)s)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--tensor", type=int, default=2, metavar="N", help="ranks that share every layer (default 2)")
    ways.add_argument("--pipeline", type=int, metavar="N", help="ranks that share out the layers")
    options = parser.parse_args()

    dist.init_process_group("sparsecomm")
    torch.set_num_threads(1)  # the ranks share this machine's cores
    torch.manual_seed(0)
    training, _ = load_text()
    columns = options.pipeline or options.tensor
    mesh = init_device_mesh("cpu", (dist.get_world_size() // columns, columns), mesh_dim_names=("data", "model"))
    split = split_layers if options.pipeline else split_tensors
    sparse = sc.SparseConfig(compressor=sc.TopK(density=options.density), collective="allgather")
    part, state = split(TinyGPT(), mesh, sparse)
    optimizers: list[torch.optim.Optimizer] = [sc.optim.AdamW(part.own.values(), state, lr=2e-3)]
    if part.shared:
        optimizers.append(torch.optim.AdamW(part.shared.values(), lr=2e-3))

    for step in range(options.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = part.gradients(*random_batch(training, mesh.get_local_rank("data"), step))
        for optimizer in optimizers:
            optimizer.step()
        if dist.get_rank() == columns - 1 and (step + 1) % 20 == 0:  # the end of the first row knows the loss
            print(f"step {step + 1}: training loss {loss:.3f}", flush=True)

    if dist.get_rank() == columns - 1:
        dense = sum(p.numel() for p in part.shared.values())
        print(f"{state.metrics().ratio:.1f} times fewer bytes than dense, but for {dense:,} shared parameters")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
