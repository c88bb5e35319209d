"""Split-reduce: a sparse allreduce whose bytes do not grow with the number of ranks."""

from sparsecomm.exchange.methods.split_reduce.method import SplitReduce, Ssar

__all__ = ["SplitReduce", "Ssar"]
