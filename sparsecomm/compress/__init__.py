"""Compressors: from a gradient and its residual to a sparse selection. Nothing here knows MPI or bytes."""

from sparsecomm.compress.accumulate import Bucket, ChunkNorms, Taken, accumulate, take_all, take_some
from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers, SelectorMemory
from sparsecomm.compress.chunks import ChunkTopK, largest_chunks
from sparsecomm.compress.dense import Dense
from sparsecomm.compress.feedback import AdamCorrection, ErrorFeedback, Feedback, MomentumCorrection
from sparsecomm.compress.lowrank import Matrix, PowerSGD, matrices_of, orthonormal, random_factor
from sparsecomm.compress.places import Places
from sparsecomm.compress.residuals import BucketLayout, ResidualStore, check_residuals
from sparsecomm.compress.schedule import Constant, Density, Geometric, Warmup, density_at
from sparsecomm.compress.shared import CyclicTopK, RandomK, SharedPositions
from sparsecomm.compress.signs import Sign
from sparsecomm.compress.threshold import ThresholdTopK
from sparsecomm.compress.topk import TopK

__all__ = [
    "AdamCorrection",
    "Bucket",
    "BucketLayout",
    "ChunkNorms",
    "ChunkTopK",
    "Compressor",
    "Constant",
    "CyclicTopK",
    "Dense",
    "Density",
    "ErrorFeedback",
    "Feedback",
    "Geometric",
    "Matrix",
    "MomentumCorrection",
    "Places",
    "PowerSGD",
    "RandomK",
    "ResidualStore",
    "Selection",
    "SelectionBuffers",
    "SelectorMemory",
    "SharedPositions",
    "Sign",
    "Taken",
    "ThresholdTopK",
    "TopK",
    "Warmup",
    "accumulate",
    "check_residuals",
    "density_at",
    "largest_chunks",
    "matrices_of",
    "orthonormal",
    "random_factor",
    "take_all",
    "take_some",
]
