"""Two levels: dense inside a node, sparse between nodes."""

from sparsecomm.exchange.methods.two_level.method import TwoLevel

__all__ = ["TwoLevel"]
