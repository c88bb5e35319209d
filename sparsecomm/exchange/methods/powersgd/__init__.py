"""PowerSGD (Vogels et al. 2019): dense sums of low-rank factors."""

from sparsecomm.exchange.methods.powersgd.method import LowRank

__all__ = ["LowRank"]
