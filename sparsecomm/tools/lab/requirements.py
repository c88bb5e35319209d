"""Checks that this machine can make labs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

__all__ = ["missing"]

_PACKAGES = {
    **dict.fromkeys(("ip", "tc"), "iproute2"),
    **dict.fromkeys(("nsenter", "unshare", "taskset"), "util-linux"),
    "mount": "mount",
}


def missing() -> str | None:
    """Returns why this process cannot make labs and how to fix that, in one line; None if it can."""
    if sys.platform != "linux":
        return f"labs need Linux network namespaces, and this is {sys.platform}"
    for tool, package in _PACKAGES.items():
        if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            return f"`{tool}` is not installed: install {package} (Debian, Ubuntu: apt-get install {package})"
    if os.geteuid() != 0:
        return f"making network namespaces needs root, and this is user {os.geteuid()}: run it with sudo"
    command = ["unshare", "--net", "--mount", "--uts", "true"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30.0, check=False)
    if done.returncode:
        said = done.stderr.strip().removeprefix("unshare: ")
        return f"root may not make namespaces here ({said}): start the container with --privileged"
    return None
