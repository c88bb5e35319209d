"""Which collective to use: measured costs, predictions for every bucket, trials of the best few, one decision."""

from sparsecomm.exchange.auto.chooser import Chooser
from sparsecomm.exchange.auto.predict import Candidate, candidates

__all__ = ["Candidate", "Chooser", "candidates"]
