"""Optimizers whose moments are computed before compression, with gradients taken step-ahead."""

from sparsecomm.optim.adamw import AdamW
from sparsecomm.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
