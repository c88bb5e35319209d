"""PowerSGD (Vogels et al. 2019): low-rank factors, summed densely."""

from sparsecomm.exchange.methods.powersgd.method import LowRank

__all__ = ["LowRank"]
