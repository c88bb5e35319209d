"""What the pipeline of a bucket does differently for each collective, one a file, found by name."""

# Importing a strategy registers it.
from sparsecomm.strategies import allgather, chunked, dense, shared_index, split_reduce  # noqa: F401
from sparsecomm.strategies.base import Job, Plan, Strategy, blank_header, strategies, strategy_named, strategy_of

__all__ = ["Job", "Plan", "Strategy", "blank_header", "strategies", "strategy_named", "strategy_of"]
