"""The memory of a bucket, and the elements that leave it in a step. Uses compress; used by exchange."""

from sparsecomm.feedback.accumulate import ChunkNorms, accumulate, take_all, take_some
from sparsecomm.feedback.added import Clipping, Incoming
from sparsecomm.feedback.alignment import Alignment, Squares, is_due, sample_positions
from sparsecomm.feedback.layout import BucketLayout
from sparsecomm.feedback.memory import BucketMemory, Empty
from sparsecomm.feedback.options import AdamCorrection, ErrorFeedback, Feedback, MomentumCorrection
from sparsecomm.feedback.residuals import ResidualStore, check_residuals
from sparsecomm.feedback.taken import GradientTaken, PlacesTaken, SelectedTaken, Taken, WholeTaken
from sparsecomm.feedback.watch import Seen, Watch

__all__ = [
    "AdamCorrection",
    "Alignment",
    "BucketLayout",
    "BucketMemory",
    "ChunkNorms",
    "Clipping",
    "Empty",
    "ErrorFeedback",
    "Feedback",
    "GradientTaken",
    "Incoming",
    "MomentumCorrection",
    "PlacesTaken",
    "ResidualStore",
    "Seen",
    "SelectedTaken",
    "Squares",
    "Taken",
    "Watch",
    "WholeTaken",
    "accumulate",
    "check_residuals",
    "is_due",
    "sample_positions",
    "take_all",
    "take_some",
]
