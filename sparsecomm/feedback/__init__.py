"""What a bucket remembers of its gradients: residuals and moments, what was taken out of them, and how to undo that."""

from sparsecomm.feedback.accumulate import ChunkNorms, accumulate, take_all, take_some
from sparsecomm.feedback.layout import BucketLayout
from sparsecomm.feedback.memory import BucketMemory
from sparsecomm.feedback.options import AdamCorrection, ErrorFeedback, Feedback, MomentumCorrection
from sparsecomm.feedback.residuals import ResidualStore, check_residuals
from sparsecomm.feedback.taken import Taken

__all__ = [
    "AdamCorrection",
    "BucketLayout",
    "BucketMemory",
    "ChunkNorms",
    "ErrorFeedback",
    "Feedback",
    "MomentumCorrection",
    "ResidualStore",
    "Taken",
    "accumulate",
    "check_residuals",
    "take_all",
    "take_some",
]
