"""Starting Triton kernels: on a GPU, or in Triton's interpreter on CPU tensors (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sparsecomm.runtime.device import side_of

__all__ = [
    "ACCUMULATE_BLOCK",
    "KIND",
    "PROGRAMS",
    "bits_of",
    "ceil_div",
    "interpreter_problem",
    "joined",
    "launch",
    "read",
    "runs",
    "triton_problem",
    "upload",
]

ACCUMULATE_BLOCK = 4096
"""Elements of a dense vector that a program takes at a time: 16 for each of 256 threads, four 16-byte loads each."""

PROGRAMS = 528
"""Programs of a kernel that loops: four for each of the 132 multiprocessors of an H100 or H200."""

KIND = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
"""Kernels' number for the dtype of the gradient, 0 for none; bfloat16 is passed as int16."""


@lru_cache(maxsize=1)
def triton_problem() -> str | None:
    """Returns the reason why Triton cannot be used at all, or None. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def interpreter_problem() -> str | None:
    """Returns the reason why Triton kernels cannot run on CPU tensors, or None."""
    missing = triton_problem()
    if missing is None and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run on CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1"
    return missing


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


def bits_of(grad: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    """Returns the kernel argument for a gradient: itself, its bits if it is bfloat16, `otherwise` if there is none."""
    if grad is None:
        return otherwise
    return grad.view(torch.int16) if grad.dtype is torch.bfloat16 else grad


def launch(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
    """Starts a kernel on the current stream of its tensors' device; does nothing for 0 programs.

    Products are never fused with sums, because the reference rounds both.
    """
    if programs == 0:
        return
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[(programs,)](*args, **constants, num_warps=warps, enable_fp_fusion=False)
        return
    with np.errstate(all="ignore"):
        kernel[(programs,)](*args, **constants)


def upload(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Returns int64 numbers on a device, copied from pinned memory; any other copy would wait for the device."""
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def read(numbers: torch.Tensor) -> Any:
    """Returns a few numbers of a device as `tolist` does, after waiting for them."""
    return side_of(numbers.device).read(numbers)


def runs(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns 1-D tensors in order, with neighbours in one storage merged; no data is copied."""
    found: list[tuple[torch.Tensor, int]] = []
    end = base = 0
    for tensor in tensors:
        if not tensor.numel():
            continue
        start, storage = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        if found and start == end and storage == base:
            found[-1] = found[-1][0], found[-1][1] + tensor.numel()
        else:
            found.append((tensor, tensor.numel()))
        end, base = start + tensor.nbytes, storage
    return [first.as_strided((numel,), (1,)) for first, numel in found]


def joined(tensors: Sequence[torch.Tensor], otherwise: torch.Tensor) -> torch.Tensor:
    """Returns 1-D tensors as one, copied only if they are not adjacent in memory; `otherwise` for no elements."""
    whole = runs(tensors)
    if not whole:
        return otherwise
    return whole[0] if len(whole) == 1 else torch.cat(whole)
