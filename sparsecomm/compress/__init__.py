"""Compressors: from a gradient and its residual to a sparse selection. Nothing here knows MPI or bytes."""

from sparsecomm.compress.accumulate import Bucket, Taken, take_all, take_some
from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers
from sparsecomm.compress.dense import Dense
from sparsecomm.compress.feedback import AdamCorrection, ErrorFeedback, Feedback, MomentumCorrection
from sparsecomm.compress.lowrank import Matrix, PowerSGD, matrices_of, orthonormal, random_factor
from sparsecomm.compress.residuals import BucketLayout, ResidualStore, check_residuals
from sparsecomm.compress.schedule import Constant, Density, Geometric, Warmup, density_at
from sparsecomm.compress.signs import Sign
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
    "Matrix",
    "MomentumCorrection",
    "PowerSGD",
    "ResidualStore",
    "Selection",
    "SelectionBuffers",
    "Sign",
    "Taken",
    "ThresholdTopK",
    "TopK",
    "Warmup",
    "check_residuals",
    "density_at",
    "matrices_of",
    "orthonormal",
    "random_factor",
    "take_all",
    "take_some",
]
