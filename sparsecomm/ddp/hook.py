"""The DDP communication hook. No `from __future__ import annotations` here: DDP refuses string annotations."""

import torch
import torch.distributed as dist

from sparsecomm.ddp.state import SparseState
from sparsecomm.errors import ConfigError

__all__ = ["sparse_hook"]


def sparse_hook(state: SparseState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Averages a DDP bucket over all ranks, compressed. Use: `ddp.register_comm_hook(state, sparse_hook)`.

    Returns at once; the backward pass continues during the exchange. Collective: DDP calls the hook in the same order
    on all ranks.

    Args:
        state: options, residuals and counters of this model.
        bucket: DDP's bucket; float32, float16 or bfloat16. Mutated when the future completes.

    Returns:
        A future of the averaged flat bucket. If any rank fails, the future fails, and ``loss.backward()`` with it.

    Raises:
        ConfigError: if the state is not a `SparseState`, or under DDP's Python reducer, which ignores a hook's result.
    """
    if not isinstance(state, SparseState):
        raise ConfigError(f"sparse_hook needs a SparseState, got {state!r}; write sparsecomm.SparseState(compressor)")
    if isinstance(bucket, tuple):
        raise ConfigError(
            "this model runs under DDP's Python reducer (compiled autograd), which hands single gradients to comm "
            "hooks and ignores their result; set torch._dynamo.config.optimize_ddp = 'ddp_optimizer' (or False) before "
            "compiling; comm hooks work with both"
        )
    return state.start(bucket.index(), bucket.parameters(), bucket.buffer(), last=bucket.is_last())
