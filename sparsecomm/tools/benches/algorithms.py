"""Ways to average a gradient over all ranks: our collectives, and what Gloo and MPI offer for the same job.

All start from a dense gradient on each rank and end with its average on each, so selecting, encoding, decoding and
dividing are part of what they do. A new one takes part in `bench collectives` by registering.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.collectives import DenseSum, dense_allreduce, dense_ring_bytes
from sparsecomm.exchange import Plan, blank_header, exchange
from sparsecomm.exchange.method import strategies, strategy_of
from sparsecomm.feedback import BucketLayout, BucketMemory, ErrorFeedback, take_some
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import ValueCodec
from sparsecomm.wire import (
    HEADER_BYTES,
    CollectiveKind,
    choose_index_codec,
    decode_body,
    encode_payload,
    max_payload_bytes,
    read_header,
)

__all__ = ["ALGORITHMS", "Algorithm", "Case", "Ready", "Unavailable", "algorithm", "exchanging"]

_VALUES = ValueCodec.FP16


class Unavailable(Exception):
    """An algorithm cannot run in this job; the message says why. Raised on all ranks alike."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is to be averaged.

    Attributes:
        world: the ranks.
        work: float32, shape (n,): this rank's gradient before a call, the average over ranks after it.
        density: fraction that a sparse algorithm sends.
    """

    world: sc.World
    work: torch.Tensor
    density: float

    @property
    def k(self) -> int:
        """Elements that a sparse algorithm sends."""
        return max(1, round(self.density * self.work.numel()))

    def bucket(self, *, residual: bool) -> BucketMemory:
        """Returns a bucket of this size, with an empty residual or none."""
        numel = self.work.numel()
        rows = max(r for r in range(1, math.isqrt(numel) + 1) if numel % r == 0)
        layout = BucketLayout(("gradient",), ((rows, numel // rows),), ((numel // rows, 1),))
        return BucketMemory(0, layout, torch.zeros(numel) if residual else None)


@dataclass(frozen=True, slots=True)
class Ready:
    """An algorithm that is set up for a case.

    Attributes:
        call: averages the case's `work` over all ranks. Collective.
        bytes_sent: what this rank sent in the last call.
        counted: whether that was counted, not computed from what the algorithm is known to send at least.
    """

    call: Callable[[], object]
    bytes_sent: Callable[[], int]
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A way to average.

    Attributes:
        name: in rows and options.
        role: "ours", "peer", or "floor" (it computes what others do, and talks to nobody).
        sparse: whether it sends a fraction of the elements; else the average is exact.
        prepare: sets it up for a case; raises `Unavailable` if it cannot run in this job.
    """

    name: str
    role: str
    sparse: bool
    prepare: Callable[[Case], Ready]


ALGORITHMS: dict[str, Algorithm] = {}
"""All algorithms by name."""

_Prepare = Callable[[Case], Ready]


def algorithm(name: str, *, role: str, sparse: bool) -> Callable[[_Prepare], _Prepare]:
    """Registers a function that prepares an algorithm; see `Algorithm` for the arguments."""

    def register(prepare: _Prepare) -> _Prepare:
        ALGORITHMS[name] = Algorithm(name, role, sparse, prepare)
        return prepare

    return register


def exchanging(case: Case, kind: CollectiveKind) -> Ready:
    """Prepares whole exchanges, as training does them, by one of our collectives; a dense one in float32."""
    strategy = strategy_of(kind)
    bucket, arena = case.bucket(residual=strategy.needs_residual), Arena()
    compressor = strategy.compressor_at(case.density)
    values = ValueCodec.FP32 if kind == CollectiveKind.DENSE else _VALUES
    k = compressor.k_for(case.work.numel(), 0)
    plan = Plan(step=0, collective=kind, compressor=compressor, k=k, value_codec=values)
    last = BucketReport(bucket=0, step=0, numel=case.work.numel())

    def call() -> None:
        nonlocal last, plan
        plan = replace(plan, step=plan.step + 1)
        last = case.world.engine.call("bench", lambda channel: exchange(channel, bucket, case.work, plan, arena))

    return Ready(call, lambda: last.bytes_sent, counted=True)


for _strategy in strategies().values():  # all that a SparseState can be asked for
    algorithm(_strategy.name, role="ours", sparse=_strategy.needs_residual)(partial(exchanging, kind=_strategy.kind))


@algorithm("dense sum", role="ours", sparse=False)
def _dense_sum(case: Case) -> Ready:
    """What peers do: the sum alone, without finding out whether all ranks agree about what is summed."""
    arena, sent = Arena(), 0

    def steps(channel: Channel) -> CollectiveSteps[int]:
        yield from dense_allreduce(channel, DenseSum(case.work, scale=1.0 / case.world.size), arena, "bench")
        return channel.traffic.bytes_sent

    def call() -> None:
        nonlocal sent
        sent = case.world.engine.call("bench", steps)

    return Ready(call, lambda: sent, counted=True)


@algorithm("mpi allreduce", role="peer", sparse=False)
def _mpi_allreduce(case: Case) -> Ready:
    world, work = case.world, case.work
    if world.transport != "mpi":
        raise Unavailable(f"the ranks talk over {world.transport}, not MPI: launch with mpirun")
    from sparsecomm.transport.mpi import import_mpi

    MPI = import_mpi()
    buffer = [work.numpy(), MPI.FLOAT]

    def call() -> None:
        # Called from this thread, which spares it the hand-over to the engine's. Never two threads in MPI at once: the
        # engine calls MPI only while an exchange is in flight, and here none is.
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, buffer)
        work.mul_(1.0 / world.size)

    return Ready(call, lambda: dense_ring_bytes(work.numel(), world.size))


@algorithm("gloo allreduce", role="peer", sparse=False)
def _gloo_allreduce(case: Case) -> Ready:
    world, work = case.world, case.work

    def call() -> None:
        dist.all_reduce(work)
        work.mul_(1.0 / world.size)

    return Ready(call, lambda: dense_ring_bytes(work.numel(), world.size))


class _Selecting:
    """The computation of a sparse average without its communication: select, encode, and later decode and add."""

    def __init__(self, case: Case) -> None:
        numel = case.work.numel()
        self._case = case
        self._bucket = case.bucket(residual=True)
        self._arena = Arena()
        self._codec = choose_index_codec(case.k, numel)
        self._error = torch.empty(case.k)
        self.payload = torch.empty(max_payload_bytes(self._codec, _VALUES, case.k, numel), dtype=torch.uint8)

    def encode(self) -> int:
        """Writes this rank's payload; returns its length in bytes."""
        case, residual = self._case, self._bucket.residual
        assert residual is not None
        taken = take_some(self._bucket, case.work, sc.TopK(density=case.density), case.k, ErrorFeedback(), self._arena)
        header = blank_header(case.world.rank, case.world.size, 0, 0, case.work.numel(), CollectiveKind.ALLGATHER)
        header.value_codec, header.index_codec = _VALUES, self._codec
        error = self._error[: taken.values.numel()]
        encode_payload(header, taken.indices, taken.values, self.payload, error)
        kernels.scatter_add(residual, taken.indices, error)
        taken.commit()
        return HEADER_BYTES + header.body_bytes

    def apply(self, payloads: list[torch.Tensor]) -> None:
        """Decodes payloads by rank and leaves their average in the case's `work`."""
        parts = []
        for rank, payload in enumerate(payloads):
            header = read_header(payload)
            indices = self._arena.get(("indices", rank), header.nnz, torch.uint32)
            values = self._arena.get(("values", rank), header.nnz, torch.float32)
            decode_body(header, payload[HEADER_BYTES : HEADER_BYTES + header.body_bytes], indices, values)
            parts.append((indices, values))
        kernels.scatter_reduce(self._case.work, parts, scale=1.0 / len(payloads))


@algorithm("gloo allgather", role="peer", sparse=True)
def _gloo_allgather(case: Case) -> Ready:
    """Our payloads by Gloo's allgather, which wants equal lengths: the lengths go first, then all are padded."""
    size, selecting, arena = case.world.size, _Selecting(case), Arena()
    mine, lengths = torch.zeros(1, dtype=torch.int64), [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    sent = 0

    def call() -> None:
        nonlocal sent
        mine[0] = selecting.encode()
        dist.all_gather(lengths, mine)
        longest = max(int(n) for n in lengths)
        room: Any = arena.get("gathered", size * longest, torch.uint8).view(size, longest)
        outgoing = selecting.payload[:longest]
        dist.all_gather(list(room), outgoing)
        selecting.apply(list(room))
        sent = (size - 1) * (longest + mine.nbytes)

    return Ready(call, lambda: sent)


@algorithm("compute only", role="floor", sparse=True)
def _compute_only(case: Case) -> Ready:
    """What any sparse allgather computes on one rank, each payload of the others as long as its own."""
    selecting = _Selecting(case)

    def call() -> None:
        length = selecting.encode()
        selecting.apply([selecting.payload[:length]] * case.world.size)

    return Ready(call, lambda: 0, counted=True)
