"""The sum of sparse tensors (COO), such as gradients of an embedding with `sparse=True`."""

from __future__ import annotations

import torch

from sparsecomm.backend.moves import gather_all
from sparsecomm.backend.octets import octets
from sparsecomm.errors import ConfigError
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["check_sparse", "sum_sparse"]


def check_sparse(tensor: torch.Tensor, operation: str) -> None:
    """Checks that a sparse tensor can be summed.

    Raises:
        ConfigError: if it is not a COO tensor in host memory, or the operation is not a sum.
    """
    if operation != "SUM" or tensor.layout != torch.sparse_coo or not tensor.is_cpu:
        raise ConfigError(
            f"all_reduce of a tensor in {tensor.layout} layout on {tensor.device}: only SUM of COO on cpu"
        )


def sum_sparse(channel: Channel, tensor: torch.Tensor) -> CollectiveSteps[None]:
    """Sums a sparse tensor over all ranks, in the order of ranks. Collective.

    Args:
        channel: Ranks that take part.
        tensor: COO, of the same shape, dtype and dense dimensions on all ranks. Mutated: becomes the coalesced sum.
    """
    size, rank = channel.size, channel.rank
    mine = tensor.detach().coalesce()
    indices, values = mine.indices().contiguous(), mine.values().contiguous()
    count = torch.tensor([indices.shape[1]], dtype=torch.int64)
    counts = [count if r == rank else torch.empty_like(count) for r in range(size)]
    yield from gather_all(channel, octets(count), [octets(c) for c in counts])
    found = [int(c) for c in counts]
    all_indices = [indices if r == rank else indices.new_empty(indices.shape[0], n) for r, n in enumerate(found)]
    all_values = [values if r == rank else values.new_empty(n, *values.shape[1:]) for r, n in enumerate(found)]
    for own, blocks in ((indices, all_indices), (values, all_values)):
        yield from gather_all(channel, octets(own.view(-1)), [octets(b.view(-1)) for b in blocks])
    with torch.inference_mode(False), torch.no_grad():  # the user's tensor keeps what is made here
        total = torch.sparse_coo_tensor(
            torch.cat([i.clone() for i in all_indices], 1),
            torch.cat([v.clone() for v in all_values]),
            tensor.shape,
            dtype=tensor.dtype,
            check_invariants=True,  # of what others have sent
        ).coalesce()
        tensor.copy_(total)  # a detached one would keep its own indices
