"""Compressors: from a gradient and its residual to a sparse selection. Nothing here knows MPI or bytes."""

from sparsecomm.compress.accumulate import Bucket, Taken, take_all, take_some
from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers
from sparsecomm.compress.dense import Dense
from sparsecomm.compress.feedback import AdamCorrection, ErrorFeedback, Feedback, MomentumCorrection
from sparsecomm.compress.residuals import BucketLayout, ResidualStore, check_residuals
from sparsecomm.compress.schedule import Constant, Density, Geometric, Warmup, density_at
from sparsecomm.compress.threshold import ThresholdTopK
from sparsecomm.compress.topk import TopK

__all__ = [
    "AdamCorrection",
    "Bucket",
    "BucketLayout",
    "Compressor",
    "Constant",
    "Dense",
    "Density",
    "ErrorFeedback",
    "Feedback",
    "Geometric",
    "MomentumCorrection",
    "ResidualStore",
    "Selection",
    "SelectionBuffers",
    "Taken",
    "ThresholdTopK",
    "TopK",
    "Warmup",
    "check_residuals",
    "density_at",
    "take_all",
    "take_some",
]
