"""Averaging for PyTorch DDP and for plain modules: the comm hook, its state, and averaging without DDP."""

from sparsecomm.ddp.by_hand import allreduce_gradients
from sparsecomm.ddp.checkpoint import reshard
from sparsecomm.ddp.convergence import Convergence
from sparsecomm.ddp.hook import sparse_hook
from sparsecomm.ddp.memory import Waiting
from sparsecomm.ddp.replicas import average_replicas
from sparsecomm.ddp.state import SparseState

__all__ = ["Convergence", "SparseState", "Waiting", "allreduce_gradients", "average_replicas", "reshard", "sparse_hook"]
