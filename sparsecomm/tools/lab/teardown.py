"""Finds the parts of a lab, kills its processes and removes it. As a script, this file is the watchdog of a lab.

The watchdog must start in milliseconds and outlive its owner, so it is run by its path and imports only the standard
library: `python teardown.py NAME TOKEN OWNER_PID`, with a pipe from the owner as standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["KEEP", "ROOT", "STATE_FILE", "inside", "kill_inside", "locked", "pins", "read_state", "take_down"]

ROOT = Path("/run/sparsecomm-lab")
STATE_FILE = "state.json"
KEEP = b"keep"
"""The owner writes this to its watchdog if the lab shall outlive the owner, or is already gone."""

_MNT_DETACH = 2  # linux/fs.h
_KILL_SECONDS = 10.0


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Holds the lock under which labs are made and removed; removes `ROOT` afterwards if it is empty.

    Raises:
        OSError: `ROOT` cannot be made.
    """
    while True:
        ROOT.mkdir(mode=0o755, exist_ok=True)
        fd = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(ROOT)):
                break
        os.close(fd)  # the last holder of the lock removed the folder that we waited for
    try:
        for scrap in ROOT.glob(".*"):  # left by a process that died; holds no namespace
            shutil.rmtree(scrap, ignore_errors=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            ROOT.rmdir()
        os.close(fd)


def read_state(name: str) -> dict[str, Any] | None:
    """Returns the content of a lab's state file; {} if it is damaged, None if it does not exist."""
    try:
        state = json.loads((ROOT / name / STATE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def pins(name: str) -> dict[tuple[int, int], str]:
    """Returns the host (or "switch") of each namespace of a lab, by the namespace's device and inode."""
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        plain = os.stat(ROOT / name).st_dev
        for file in sorted((ROOT / name / "ns").iterdir()):
            stat = file.stat()
            if stat.st_dev != plain:  # a namespace is mounted on it
                found[stat.st_dev, stat.st_ino] = file.name
    return found


def inside(name: str) -> dict[int, str]:
    """Returns the host of each process in a lab's namespaces, by process id."""
    namespaces = pins(name)
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if namespaces else ():
        host = namespaces.get(_namespace_of(pid))
        if host is not None:
            found[pid] = host
    return found


def _namespace_of(pid: int) -> tuple[int, int]:
    try:
        stat = os.stat(f"/proc/{pid}/ns/net")
    except OSError:  # the process has ended or is a zombie
        return 0, 0
    return stat.st_dev, stat.st_ino


def kill_inside(name: str) -> int:
    """Kills all processes in a lab's namespaces, until none is left.

    Returns:
        Number of processes killed.

    Raises:
        OSError: This process is one of them, or one cannot be killed.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_SECONDS
    while found := inside(name):
        if os.getpid() in found:
            raise OSError(f"this process runs on {found[os.getpid()]} of lab {name!r}: do this from outside the lab")
        for pid in found:
            _kill(pid, name)
        killed |= found.keys()
        if time.monotonic() > deadline:
            raise OSError(f"processes {sorted(found)} in lab {name!r} survive SIGKILL")
        time.sleep(0.005)
    return len(killed)


def _kill(pid: int, name: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if _namespace_of(pid) in pins(name):  # the id may belong to another process by now
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def take_down(name: str) -> int:
    """Kills all processes in a lab and removes it. Call it under the lock; an interrupted call can be repeated.

    Returns:
        Number of processes killed.

    Raises:
        OSError: Something cannot be killed or removed.
    """
    folder = ROOT / name
    killed = kill_inside(name)
    # Bridge, links and addresses live in these namespaces only and vanish with them.
    for file in sorted((folder / "ns").glob("*")):
        _unpin(file)
    # One rename removes the state file together with everything else, so a partly removed lab still has its state.
    scrap = ROOT / f".{name}.{os.getpid()}"
    folder.rename(scrap)
    shutil.rmtree(scrap)
    return killed


def _unpin(file: Path) -> None:
    """Unmounts a namespace and removes the file under it, which also unmounts it in other mount namespaces."""
    umount2 = ctypes.CDLL(None, use_errno=True).umount2
    for _ in range(100):
        while umount2(os.fsencode(file), _MNT_DETACH) == 0:
            pass
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            if error.errno != errno.EBUSY:  # busy if a command of a killed owner has just mounted it
                raise
            time.sleep(0.01)
        else:
            return
    raise OSError(errno.EBUSY, "a namespace cannot be unmounted", str(file))


def _wait_for(owner: int) -> bool:
    """Waits until the owner ends or its pipe closes. Returns whether to keep the lab."""
    pipe = sys.stdin.fileno()
    ends = [pipe]
    # A forked child of the owner may hold the pipe open, so the end of the owner itself counts as well.
    with contextlib.suppress(OSError):
        ends.append(os.pidfd_open(owner))
    select.select(ends, [], [])
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe, len(KEEP)) == KEEP
    return False


def _watch(name: str, token: str, owner: int) -> None:
    """Removes the lab of this name and token when its owner dies without writing `KEEP`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # such signals address the owner's group; the watchdog must outlive it
    if _wait_for(owner):
        return
    with locked():
        if (read_state(name) or {}).get("token") == token:
            take_down(name)


if __name__ == "__main__":
    _watch(sys.argv[1], sys.argv[2], int(sys.argv[3]))
