"""Makes torch.distributed know the backend, and start without an address under MPI's launchers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import _rendezvous_handlers, register_rendezvous_handler

from sparsecomm.backend.group import Members
from sparsecomm.backend.moves import spread
from sparsecomm.backend.process_group import SparsecommGroup
from sparsecomm.backend.store import LazyStore
from sparsecomm.errors import LaunchError
from sparsecomm.launch import World, detect, join_for_torch
from sparsecomm.launch.torch_dist import STORE_NOTE_BYTES, reach_store, serve_store
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["NAME", "register"]

NAME = "sparsecomm"
_ADDRESS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_starts = itertools.count()
"""Numbers the times that torch.distributed starts here, so that the keys of one start do not confuse the next."""
_stores: list[Any] = []
"""The store of this process, kept until it ends, because other ranks may still use it."""


def register() -> None:
    """Registers the backend "sparsecomm" and the address "sparsecomm://", once."""
    if NAME in dist.Backend.backend_list:
        return
    usual = dict(dist.Backend.default_device_backend_map)
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
    dist.Backend.default_device_backend_map.update(usual)  # "cpu" stays Gloo's where nobody names a backend
    register_rendezvous_handler(NAME, _join)  # type: ignore[no-untyped-call]

    _rendezvous_handlers["env"] = _Environment(_rendezvous_handlers["env"])


class _Environment:
    """torch's start from the environment; where a launcher of MPI has set none of its variables, ours.

    Args:
        usual: torch's own handler.
    """

    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def __call__(self, url: str, **options: Any) -> Iterator[Any]:
        given = "?" in url or any(name in os.environ for name in _ADDRESS)
        start = self._usual if given or not detect().mpi else _join
        found: Iterator[Any] = start(url, **options)
        return found


def _join(url: str, timeout: timedelta = default_pg_timeout, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """Yields store, rank and size of this job. Collective."""
    world = join_for_torch()
    if not _stores:
        _stores.append(HashStore() if world.size == 1 else _make_store(world))
    yield PrefixStore(f"start{next(_starts)}", _stores[0]), world.rank, world.size
    raise LaunchError("torch.distributed cannot start again without being destroyed first")


def _make_store(world: World) -> LazyStore:
    """Makes a store on rank 0 and tells all ranks where it is. Collective."""
    limit = world.engine.timeout
    note = torch.zeros(STORE_NOTE_BYTES, dtype=torch.uint8)
    server: Any = None
    if world.rank == 0:
        server, text = serve_store(world.size, world.local_size, limit)
        note.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def steps(channel: Channel) -> CollectiveSteps[None]:
        return spread(channel, note, 0)

    world.engine.call("start of torch.distributed", steps)
    told = bytes(note.tolist())
    return LazyStore(lambda: reach_store(told, world.rank, world.size, limit) if server is None else server)


def _create(options: Any, chosen: Any) -> SparsecommGroup:
    """Makes a process group. Collective among its ranks."""
    world = join_for_torch()
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    if not options.global_ranks_in_group and (options.group_rank, options.group_size) != (world.rank, world.size):
        raise LaunchError(
            f"init_process_group was called as rank {options.group_rank} of {options.group_size}, the launcher says "
            f"rank {world.rank} of {world.size}; leave rank and size out"
        )
    limit = None if options.timeout == default_pg_timeout else options.timeout.total_seconds()
    return SparsecommGroup(Members(world.engine, ranks, str(options.group_id), limit))
