"""Brings up torch.distributed (Gloo, and NCCL on GPUs) without an address or port from the user."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import struct
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from sparsecomm.errors import LaunchError

__all__ = [
    "STORE_NOTE_BYTES",
    "init_from_environment",
    "init_over_mpi",
    "init_solo",
    "leave_torch",
    "reach_store",
    "serve_store",
]

_SIOCGIFADDR = 0x8915  # linux/sockios.h
STORE_NOTE_BYTES = 4096
"""Bytes in which rank 0 tells where its store is."""
_worlds = itertools.count()
"""Numbers the worlds that this process joins one after the other."""


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def init_solo() -> None:
    """Brings up a world of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


def leave_torch() -> None:
    """Closes all process groups, and with them the connections on which other ranks may wait for this one."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def init_from_environment(timeout: float) -> None:
    """Brings up the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT define. Collective."""
    limit = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    # torchrun's store still has the addresses of a world that was shut down before, and torch would connect to them.
    fresh = PrefixStore(f"sparsecomm/{next(_worlds)}", store)
    dist.init_process_group(_backend(), store=fresh, rank=rank, world_size=size, timeout=limit)


def init_over_mpi(comm: Any, node_size: int, timeout: float) -> Any:
    """Brings up the world of an MPI communicator. Collective.

    Rank 0 opens a store on a free port and broadcasts its addresses and the port over MPI.

    Args:
        comm: An mpi4py communicator over all ranks.
        node_size: Number of ranks on this node. If that is all ranks, they use the loopback address.
        timeout: Seconds that an operation of torch.distributed may take.

    Returns:
        The store, which the caller must keep alive.

    Raises:
        LaunchError: if a rank cannot reach rank 0. The message names the addresses that it tried.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    note = np.zeros(STORE_NOTE_BYTES, dtype=np.uint8)
    store: Any = None
    if rank == 0:
        store, text = serve_store(size, node_size, timeout)
        note[:] = np.frombuffer(text, dtype=np.uint8)
    comm.Bcast(note, root=0)
    if rank != 0:
        store = reach_store(bytes(note), rank, size, timeout)
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    return store


def serve_store(size: int, node_size: int, timeout: float) -> tuple[Any, bytes]:
    """Makes the store of torch.distributed on rank 0.

    Args:
        size: Number of ranks.
        node_size: Number of ranks on this node. If that is all ranks, they use the loopback address.
        timeout: Seconds that an operation of the store may take.

    Returns:
        The store, and `STORE_NOTE_BYTES` bytes with which `reach_store` finds it.
    """
    store = TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=timeout), wait_for_workers=False)
    addresses = ["127.0.0.1"] if node_size == size else _own_addresses()
    return store, f"{store.port} {' '.join(addresses)}".encode()[:STORE_NOTE_BYTES].ljust(STORE_NOTE_BYTES, b"\0")


def reach_store(note: bytes, rank: int, size: int, timeout: float) -> Any:
    """Connects to the store of rank 0, which has told where it is.

    Raises:
        LaunchError: if this rank cannot reach it. The message names the addresses that it tried.
    """
    port, *addresses = note.rstrip(b"\0").decode().split()
    host = _reachable_address(addresses, int(port), rank)
    return TCPStore(host, int(port), size, False, timedelta(seconds=timeout))


def _own_addresses() -> list[str]:
    """Returns addresses at which other nodes may reach this node, the most likely first."""
    found = [os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
    wanted = os.environ.get("GLOO_SOCKET_IFNAME")
    names = [wanted] if wanted else [name for _, name in socket.if_nameindex()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for name in names:
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(s, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(reply[20:24]))
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    return [a for a in dict.fromkeys(found) if not a.startswith("127.")] or ["127.0.0.1"]


def _reachable_address(addresses: list[str], port: int, rank: int) -> str:
    """Returns the first address at which this rank reaches rank 0.

    Raises:
        LaunchError: if there is none.
    """
    for address in addresses:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5.0):
            return address
    raise LaunchError(
        f"rank {rank} on {socket.gethostname()} reaches rank 0 at none of {addresses} (port {port}); "
        "set MASTER_ADDR or GLOO_SOCKET_IFNAME to the network that joins the nodes"
    )
