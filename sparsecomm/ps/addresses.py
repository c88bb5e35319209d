"""The files of a rendezvous folder: servers' addresses, and the ranks that joiners have taken.

`server-<index>.json`, or with a number before the dot where another job has that name already, is an address.
`joiner-<job>-<rank>` marks a rank as taken. The folder may hold anything else, and files of jobs that are dead: readers
skip files that are no address, and a job removes its own files alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from sparsecomm.errors import LaunchError
from sparsecomm.transport.mailbox.tcp import MOST_JOINERS, TOKEN_BYTES

__all__ = ["Address", "claim", "read_addresses", "remove", "write"]

_MOST_BYTES = 1 << 20  # of an address; one has a few hundred
_MOST_RANKS = 1 << 31
_LONGEST = 255  # characters of a host, of a job's name and of a mode
_FIELDS = {
    "host": str,
    "port": int,
    "token": str,
    "job": str,
    "index": int,
    "servers": list,
    "workers": list,
    "world": int,
    "mode": str,
}


@dataclass(frozen=True)
class Address:
    """The address of a server.

    Attributes:
        host: Name or address of its host.
        port: TCP port.
        token: Secret that a joiner must present.
        job: Name that the servers of a job share.
        index: Index of the server.
        servers: Ranks of the job's servers, by index.
        workers: Ranks of its workers at the start.
        world: Number of its ranks at the start.
        mode: Text of its mode.
    """

    host: str
    port: int
    token: bytes
    job: str
    index: int
    servers: tuple[int, ...]
    workers: tuple[int, ...]
    world: int
    mode: str


def write(folder: Path, address: Address) -> Path:
    """Writes an address to a file that only its owner can read; returns its path.

    Raises:
        OSError: If that is not possible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".server-{secrets.token_hex(8)}"
    try:
        with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(vars(address) | {"token": address.token.hex()}, file)
        for number in count():
            path = folder / f"server-{address.index}{f'-{number}' if number else ''}.json"
            with contextlib.suppress(FileExistsError):
                _place(written, path)
                return path
    finally:
        written.unlink(missing_ok=True)
    raise AssertionError


def _place(written: Path, path: Path) -> None:
    """Gives a file a name that no other file has, so that a reader never sees half of it.

    Raises:
        FileExistsError: If the name is taken.
    """
    try:
        os.link(written, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(written, path)


def remove(path: Path, address: Address) -> None:
    """Removes an address, if the file still has it, and the job's taken ranks once no address of the job is left."""
    folder, job = path.parent, address.job
    with contextlib.suppress(OSError, ValueError):
        if _read(path) == address:
            path.unlink()
    if any(found.job == job for found, _ in read_addresses(folder)[0]):
        return
    for taken in folder.glob(f"joiner-{_plain(job)}-*"):
        if taken.name.removeprefix(f"joiner-{_plain(job)}-").isdecimal():
            with contextlib.suppress(OSError):
                taken.unlink()


def read_addresses(folder: Path) -> tuple[list[tuple[Address, int]], dict[Path, str]]:
    """Reads all addresses in a folder.

    Returns:
        The addresses, each with the time at which it was written (in nanoseconds, the newest last), and the reason why
        each other file with an address's name is none.
    """
    found: list[tuple[int, str, Address]] = []
    skipped: dict[Path, str] = {}
    for path in sorted(_named(folder)):
        try:
            found.append((path.lstat().st_mtime_ns, path.name, _read(path)))
        except FileNotFoundError:
            continue  # its job has just removed it
        except (OSError, ValueError, RecursionError) as error:
            skipped[path] = str(error)[:_LONGEST]
    return [(address, at) for at, _, address in sorted(found, key=lambda f: f[:2])], skipped


def _named(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from folder.glob("server-*.json")


def _read(path: Path) -> Address:
    """Reads an address.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is none.
    """
    # A link may lead anywhere, and opening a pipe or a device may block.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is no regular file")
        if facts.st_size > _MOST_BYTES:
            raise ValueError(f"it has {facts.st_size} bytes, an address has at most {_MOST_BYTES}")
        content = json.loads(file.read(_MOST_BYTES).decode())
    if not isinstance(content, dict) or content.keys() != _FIELDS.keys():
        raise ValueError(f"it has not the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(content[name]) is not kind:
            raise ValueError(f"{name} = {str(content[name])[:40]!r} must be {kind.__name__}")
    return _checked(content)


def _checked(content: dict[str, Any]) -> Address:
    """Returns the address in a file's content, whose fields have the right types.

    Raises:
        ValueError: If a value is wrong. It names the field and the value.
    """
    token, world = bytes.fromhex(content["token"]), content["world"]
    servers, workers = content["servers"], content["workers"]
    good = {
        "host": 0 < len(content["host"]) <= _LONGEST and content["host"].isprintable(),
        "port": 0 < content["port"] < 1 << 16,
        "token": len(token) == TOKEN_BYTES,
        "job": 0 < len(content["job"]) <= _LONGEST and content["job"].isprintable(),
        "world": 0 < world < _MOST_RANKS,
        "servers": bool(servers) and _are_ranks(servers, world),
        "workers": bool(workers) and _are_ranks([*servers, *workers], world),
        "index": 0 <= content["index"] < len(servers),
        "mode": 0 < len(content["mode"]) <= _LONGEST,
    }
    for name, right in good.items():
        if not right:
            raise ValueError(f"{name} = {str(content[name])[:40]!r} cannot be")
    ranks = {"servers": tuple(servers), "workers": tuple(workers)}
    return Address(**(content | {"token": token} | ranks))


def _are_ranks(values: list[Any], world: int) -> bool:
    return all(type(v) is int and 0 <= v < world for v in values) and len(set(values)) == len(values)


def claim(folder: Path, address: Address) -> int:
    """Takes the first rank after the job's ranks that no other joiner has had. Ranks are never used twice.

    Raises:
        LaunchError: If none is left, or the folder cannot be written to.
    """
    for rank in range(address.world, address.world + MOST_JOINERS):
        try:
            name = folder / f"joiner-{_plain(address.job)}-{rank}"
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            return rank
        except FileExistsError:
            continue
        except OSError as error:
            raise LaunchError(f"cannot take a rank in {folder}: {error}") from error
    raise LaunchError(f"cannot take a rank in {folder}: {MOST_JOINERS} workers have joined job {address.job!r} already")


def _plain(job: str) -> str:
    """Returns a job's name as a part of a file's name, different for different jobs."""
    digest = hashlib.blake2b(job.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{''.join(c if c.isalnum() else '-' for c in job[:40])}-{digest}"
