"""Where training frameworks hand their gradients over."""

from sparsecomm.hooks.checkpoint import reshard
from sparsecomm.hooks.ddp import sparse_hook
from sparsecomm.hooks.manual import allreduce_gradients
from sparsecomm.hooks.state import SparseState

__all__ = ["SparseState", "allreduce_gradients", "reshard", "sparse_hook"]
