"""Choice of the implementation: one of the C++ paths, the reference, or Triton for tensors on a GPU."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache

import torch

from sparsecomm.errors import ConfigError, KernelError
from sparsecomm.kernels import native, reference
from sparsecomm.kernels.api import BatchKernels, HostKernels, Kernels
from sparsecomm.kernels.triton.launch import interpreter_problem, triton_problem

__all__ = [
    "PATHS",
    "available_paths",
    "batch_kernels_for",
    "current_path",
    "host_kernels",
    "kernels",
    "kernels_for",
    "native_problem",
    "release_scratch",
    "scratch_bytes",
    "set_path",
]

PATHS = ("avx512", "avx2", "portable", "reference", "triton")
"""All kernel paths for CPU tensors, fastest first. Triton, the only path on a GPU, is interpreted on the CPU."""

_ENV = "SPARSECOMM_KERNELS"
_path: str | None = None
_impl: Kernels | None = None


def available_paths() -> tuple[str, ...]:
    """Returns the paths that can run CPU tensors here, fastest first; with triton only if ``TRITON_INTERPRET=1``."""
    interpreted = ("triton",) if interpreter_problem() is None else ()
    return (*native.supported_paths(), "reference", *interpreted)


def native_problem() -> str | None:
    """Returns the reason why the native kernels cannot be used, or None if they can."""
    return native.problem


def current_path() -> str:
    """Returns the path in use; chooses one if none has been chosen yet.

    Raises:
        ConfigError: if ``SPARSECOMM_KERNELS`` names a path that cannot run here.
    """
    kernels()
    assert _path is not None
    return _path


def set_path(name: str | None) -> None:
    """Switches all kernels, in every thread, to another path. For tests and benches.

    Args:
        name: one of `available_paths()`, or None for the default: the environment variable's, else the fastest.

    Raises:
        ConfigError: if that path does not exist or cannot run here.
    """
    global _path, _impl
    available = available_paths()
    source = "path"
    if name is None:
        name, source = os.environ.get(_ENV) or available[0], _ENV
    if name not in available:
        problem = interpreter_problem() if name == "triton" else native.problem if name in PATHS else None
        why = f" ({problem})" if problem else ""
        raise ConfigError(f"{source} = {name!r} cannot be used here{why}; available: {', '.join(available)}")
    if name == "reference":
        _impl = reference
    elif name == "triton":
        _impl = _triton()
    else:
        native.set_path(name)
        _impl = native
    _path = name


@lru_cache(maxsize=1)
def _triton() -> BatchKernels:
    module: BatchKernels = importlib.import_module("sparsecomm.kernels.triton.path")
    return module


def kernels_for(*tensors: torch.Tensor) -> Kernels:
    """Returns the implementation for these tensors: Triton on a GPU, else the one in use.

    Raises:
        KernelError: if the tensors are on several devices, or on a GPU and Triton is not installed.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            return _on_gpu(tensors)
    return kernels()


def batch_kernels_for(*tensors: torch.Tensor) -> BatchKernels | None:
    """Returns the implementation for these tensors if it handles many payloads in one call, as Triton does; else None.

    Raises:
        KernelError: as `kernels_for`.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            return _on_gpu(tensors)
    kernels()
    return _triton() if _path == "triton" else None


def _on_gpu(tensors: tuple[torch.Tensor, ...]) -> BatchKernels:
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise KernelError(f"all tensors of a call must be on one device, got {', '.join(devices)}")
    problem = triton_problem()
    if problem is not None:
        raise KernelError(f"tensors on {devices[0]} need Triton kernels, but {problem}: pip install 'sparsecomm[gpu]'")
    return _triton()


def kernels() -> Kernels:
    """Returns the implementation in use for CPU tensors; chooses one if none has been chosen yet."""
    if _impl is None:
        set_path(None)
        assert _impl is not None
    return _impl


def host_kernels() -> HostKernels:
    """Returns the implementation in use for CPU tensors for which `batch_kernels_for` returns None."""
    return reference if kernels() is reference else native


def scratch_bytes() -> int:
    """Returns the bytes of work space that the native kernels hold over all threads.

    It only grows, up to about 10 bytes * k.
    """
    return native.scratch_bytes()


def release_scratch() -> None:
    """Frees the work space of the calling thread; the next exact_topk allocates it again."""
    native.release_scratch()
