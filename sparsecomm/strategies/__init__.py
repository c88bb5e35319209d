"""What the pipeline of a bucket does differently for each collective, one a file, found by name."""

# Importing a strategy registers it.
from sparsecomm.strategies import allgather, dense, powersgd, sign, split_reduce, tree, two_level  # noqa: F401
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
