"""`collective="auto"`: measures costs, predicts seconds for every bucket, tries the best options and decides."""

from sparsecomm.exchange.auto.chooser import Chooser
from sparsecomm.exchange.auto.predict import Candidate, candidates

__all__ = ["Candidate", "Chooser", "candidates"]
