"""Compressors: they select elements of a gradient and its residual. This package knows neither MPI nor bytes."""

from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers, SelectorMemory
from sparsecomm.compress.chunks import ChunkTopK, largest_chunks
from sparsecomm.compress.dense import Dense
from sparsecomm.compress.places import Places
from sparsecomm.compress.powersgd import PowerSGD
from sparsecomm.compress.schedule import Constant, Density, Geometric, Warmup, density_at
from sparsecomm.compress.shared import CyclicTopK, RandomK, SharedPositions
from sparsecomm.compress.signs import Sign
from sparsecomm.compress.threshold import ThresholdTopK
from sparsecomm.compress.topk import TopK

__all__ = [
    "ChunkTopK",
    "Compressor",
    "Constant",
    "CyclicTopK",
    "Dense",
    "Density",
    "Geometric",
    "Places",
    "PowerSGD",
    "RandomK",
    "Selection",
    "SelectionBuffers",
    "SelectorMemory",
    "SharedPositions",
    "Sign",
    "ThresholdTopK",
    "TopK",
    "Warmup",
    "density_at",
    "largest_chunks",
]
