"""What the pipeline of a bucket does differently for each collective, one a file, found by name."""

# Importing a strategy registers it.
from sparsecomm.strategies import (  # noqa: F401
    allgather,
    chunked,
    dense,
    powersgd,
    shared_index,
    sign,
    split_reduce,
    tree,
    two_level,
)
from sparsecomm.strategies.base import Job, Plan, Strategy, blank_header, strategies, strategy_named, strategy_of
from sparsecomm.strategies.costs import Costs, Estimate

__all__ = [
    "Costs",
    "Estimate",
    "Job",
    "Plan",
    "Strategy",
    "blank_header",
    "strategies",
    "strategy_named",
    "strategy_of",
]
