"""Argument checks shared by every kernel path.

They run on every call, thousands of times a step for models with many small buckets. So the good case costs a few
attribute look-ups, and the explanation is built only when a check fails.
"""

from __future__ import annotations

import ctypes
from typing import NoReturn

import numpy as np
import torch

from sparsecomm.errors import KernelError, WireError
from sparsecomm.types import GRAD_DTYPES, MAX_NUMEL

__all__ = [
    "borrowed_bytes",
    "byte_vec",
    "capacity",
    "count",
    "grad_like",
    "index_vec",
    "refuse",
    "value_vec",
    "wire_counts",
]

_F32 = torch.float32
_U32 = torch.uint32
_U8 = torch.uint8


def refuse(message: str) -> NoReturn:
    """Raises KernelError with a message."""
    raise KernelError(message)


def _bad(name: str, tensor: object, want: str) -> NoReturn:
    if not isinstance(tensor, torch.Tensor):
        refuse(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    layout = "contiguous" if tensor.layout == torch.strided and tensor.is_contiguous() else "not contiguous"
    refuse(
        f"{name} must be a contiguous 1-D CPU or CUDA tensor of dtype {want}, got dtype {tensor.dtype}, "
        f"shape {tuple(tensor.shape)}, device {tensor.device}, {layout}"
    )


def value_vec(name: str, tensor: torch.Tensor) -> int:
    """Returns the length of a float32 vector, or raises KernelError."""
    try:
        if tensor.dtype is _F32 and (tensor.is_cpu or tensor.is_cuda) and tensor.is_contiguous() and tensor.dim() == 1:
            n = tensor.numel()
            if n <= MAX_NUMEL:
                return n
            refuse(f"{name} has {n} elements, more than 2**32 = {MAX_NUMEL}")
    except (AttributeError, RuntimeError) as error:
        if isinstance(error, KernelError):
            raise
    _bad(name, tensor, "torch.float32")


def index_vec(name: str, tensor: torch.Tensor) -> int:
    """Returns the length of a uint32 vector, or raises KernelError."""
    try:
        if tensor.dtype is _U32 and (tensor.is_cpu or tensor.is_cuda) and tensor.is_contiguous() and tensor.dim() == 1:
            return tensor.numel()
    except (AttributeError, RuntimeError):
        pass
    _bad(name, tensor, "torch.uint32")


def byte_vec(name: str, tensor: torch.Tensor) -> int:
    """Returns the length of a uint8 vector in bytes, or raises KernelError."""
    try:
        if tensor.dtype is _U8 and (tensor.is_cpu or tensor.is_cuda) and tensor.is_contiguous() and tensor.dim() == 1:
            return tensor.numel()
    except (AttributeError, RuntimeError):
        pass
    _bad(name, tensor, "torch.uint8")


def grad_like(name: str, tensor: torch.Tensor) -> int:
    """Returns the length of a float32, float16 or bfloat16 vector, or raises KernelError."""
    try:
        here = tensor.is_cpu or tensor.is_cuda
        if tensor.dtype in GRAD_DTYPES and here and tensor.is_contiguous() and tensor.dim() == 1:
            n = tensor.numel()
            if n <= MAX_NUMEL:
                return n
            refuse(f"{name} has {n} elements, more than 2**32 = {MAX_NUMEL}")
    except (AttributeError, RuntimeError) as error:
        if isinstance(error, KernelError):
            raise
    _bad(name, tensor, "torch.float32, torch.float16 or torch.bfloat16")


def capacity(out_indices: torch.Tensor, out_values: torch.Tensor) -> int:
    """Returns the common length of a pair of output buffers, or raises KernelError."""
    cap = index_vec("out_indices", out_indices)
    other = value_vec("out_values", out_values)
    if cap != other:
        refuse(f"out_indices has {cap} elements and out_values {other}: they must be equally long")
    return cap


def count(name: str, value: int, limit: int | None = None) -> None:
    """Raises KernelError unless value is at least 0 and, if a limit is given, at most the limit."""
    if value < 0 or (limit is not None and value > limit):
        most = "" if limit is None else f" and at most {limit}"
        refuse(f"{name} must be at least 0{most}, got {value}")


def wire_counts(nnz: int, numel: int) -> None:
    """Raises WireError unless 0 <= nnz <= numel <= 2**32. Both may come from a hostile header."""
    if not 0 <= numel <= MAX_NUMEL:
        raise WireError("numel", numel, f"must be between 0 and {MAX_NUMEL}")
    if not 0 <= nnz <= numel:
        raise WireError("nnz", nnz, f"must be between 0 and numel = {numel}")


def borrowed_bytes(data: bytes | bytearray | memoryview) -> torch.Tensor:
    """Returns a uint8 tensor over a byte buffer, without a copy. Never write to it: the buffer may be read-only."""
    view = memoryview(data)
    if not view.c_contiguous:
        refuse("data must be a contiguous buffer")
    array = np.frombuffer(view.cast("B") if view.nbytes else b"", dtype=np.uint8)
    address = array.__array_interface__["data"][0]
    if array.flags.writeable or not len(array):
        return torch.from_numpy(array.copy() if not len(array) else array)
    # torch warns about read-only memory. The kernels only read this tensor, so the memory is passed as writable.
    borrowed = (ctypes.c_uint8 * len(array)).from_address(address)
    tensor = torch.frombuffer(borrowed, dtype=torch.uint8)
    tensor.sparsecomm_owner = data  # type: ignore[attr-defined]  # keeps the memory alive
    return tensor
