"""Where training frameworks hand their gradients over."""

from sparsecomm.hooks.ddp import sparse_hook
from sparsecomm.hooks.state import SparseState

__all__ = ["SparseState", "sparse_hook"]
