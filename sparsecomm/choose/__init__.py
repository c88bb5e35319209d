"""Which collective to use: measured costs, predictions for every bucket, trials of the best few, one decision."""

from sparsecomm.choose.chooser import Chooser
from sparsecomm.choose.predict import Candidate, candidates

__all__ = ["Candidate", "Chooser", "candidates"]
