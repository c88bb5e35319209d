"""Numpy views of tensors."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

__all__ = ["array"]


def array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Returns a numpy array over the tensor's memory; writing to it writes to the tensor."""
    return tensor.detach().numpy()
