"""Compressors: from a gradient and its residual to a sparse selection. Nothing here knows MPI or bytes."""

from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers
from sparsecomm.compress.dense import Dense
from sparsecomm.compress.feedback import BucketLayout, ErrorFeedback, ResidualStore, roll_back
from sparsecomm.compress.schedule import Constant, Density, Warmup, density_at
from sparsecomm.compress.threshold import ThresholdTopK
from sparsecomm.compress.topk import TopK

__all__ = [
    "BucketLayout",
    "Compressor",
    "Constant",
    "Dense",
    "Density",
    "ErrorFeedback",
    "ResidualStore",
    "Selection",
    "SelectionBuffers",
    "ThresholdTopK",
    "TopK",
    "Warmup",
    "density_at",
    "roll_back",
]
