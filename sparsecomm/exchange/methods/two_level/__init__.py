"""Two levels: dense sums inside a node, a sparse exchange between nodes."""

from sparsecomm.exchange.methods.two_level.method import TwoLevel

__all__ = ["TwoLevel"]
