"""Times MPI messages between ranks 0 and 1 in both directions; prints the best rate of three for each, in Mbit/s."""

from __future__ import annotations

import sys
import time

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
data, empty = np.zeros(int(sys.argv[1]), dtype=np.uint8), np.zeros(1, dtype=np.uint8)
FRAME = 1514 / 1448  # bytes on the wire per byte of TCP payload
for sender in (0, 1):
    seconds = []
    for _ in range(3):
        comm.Barrier()
        start = time.perf_counter()
        if comm.rank == sender:
            comm.Send(data, 1 - sender)
            comm.Recv(empty, 1 - sender)
        else:
            comm.Recv(data, sender)
            comm.Send(empty, sender)
        seconds.append(time.perf_counter() - start)
    if comm.rank == 0:
        print(data.nbytes * 8 * FRAME / min(seconds) / 1e6, flush=True)
