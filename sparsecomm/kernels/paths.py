"""Which implementation the kernels use: one of the C++ paths, or the reference."""

from __future__ import annotations

import os

from sparsecomm.errors import ConfigError
from sparsecomm.kernels import native, reference
from sparsecomm.kernels.api import Kernels

__all__ = [
    "PATHS",
    "available_paths",
    "current_path",
    "kernels",
    "native_problem",
    "release_scratch",
    "scratch_bytes",
    "set_path",
]

PATHS = ("avx512", "avx2", "portable", "reference")
"""All kernel paths, fastest first."""

_ENV = "SPARSECOMM_KERNELS"
_path: str | None = None
_impl: Kernels | None = None


def available_paths() -> tuple[str, ...]:
    """The paths that this installation and this CPU can run, fastest first."""
    return (*native.supported_paths(), "reference")


def native_problem() -> str | None:
    """Why the native kernels cannot be used, or None if they can."""
    return native.problem


def current_path() -> str:
    """The path in use; chooses one if none was chosen yet.

    Raises:
        ConfigError: if ``SPARSECOMM_KERNELS`` names a path that cannot run here.
    """
    kernels()
    assert _path is not None
    return _path


def set_path(name: str | None) -> None:
    """Switches all kernels, in every thread, to another path: for tests and benches.

    Args:
        name: one of `available_paths()`, or None for the default choice (environment variable, else the fastest).

    Raises:
        ConfigError: if that path does not exist or cannot run here.
    """
    global _path, _impl
    available = available_paths()
    source = "path"
    if name is None:
        name, source = os.environ.get(_ENV) or available[0], _ENV
    if name not in available:
        why = f" ({native.problem})" if name in PATHS and native.problem else ""
        raise ConfigError(f"{source} = {name!r} cannot be used here{why}; available: {', '.join(available)}")
    if name == "reference":
        _impl = reference
    else:
        native.set_path(name)
        _impl = native
    _path = name


def kernels() -> Kernels:
    """The implementation in use; chooses one if none was chosen yet."""
    if _impl is None:
        set_path(None)
        assert _impl is not None
    return _impl


def scratch_bytes() -> int:
    """Bytes of work space that the native kernels hold over all threads: it only grows, up to about 10 bytes * k."""
    return native.scratch_bytes()


def release_scratch() -> None:
    """Frees the work space of the calling thread; the next exact_topk allocates it again."""
    native.release_scratch()
