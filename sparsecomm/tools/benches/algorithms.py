"""Algorithms that average a gradient over all ranks: our collectives, and those of Gloo and MPI.

Each starts with a dense gradient on every rank and ends with the average on every rank, so its time includes selecting,
encoding, decoding and dividing. A new algorithm takes part in `bench collectives` as soon as it is registered.
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
from sparsecomm.collectives import (
    DenseSum,
    dense_allreduce,
    dense_ring_bytes,
    doubling_allreduce,
    halving_allreduce,
    ring_allreduce,
)
from sparsecomm.collectives.allreduce_costs import ring_segment
from sparsecomm.exchange import Plan, blank_header, exchange
from sparsecomm.exchange.method import method_named, methods
from sparsecomm.exchange.methods.allgather import Allgather
from sparsecomm.feedback import BucketLayout, BucketMemory, Incoming, take_some
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.tools.benches.compressors import compressor_for
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import ValueCodec
from sparsecomm.wire import (
    HEADER_BYTES,
    choose_index_codec,
    decode_body,
    encode_payload,
    max_payload_bytes,
    read_header,
)

__all__ = ["ALGORITHMS", "Algorithm", "Case", "Ready", "Unavailable", "algorithm", "exchanging"]

_VALUES = ValueCodec.FP16


class Unavailable(Exception):
    """An algorithm cannot run in this job, for the reason in the message. It is raised on all ranks or none."""


@dataclass(frozen=True, slots=True)
class Case:
    """The gradient to average.

    Attributes:
        world: The ranks.
        work: This rank's gradient before a call and the average over ranks after it; float32, shape (n,).
        density: Fraction of the elements that a sparse algorithm sends.
    """

    world: sc.World
    work: torch.Tensor
    density: float

    @property
    def k(self) -> int:
        """Number of elements that a sparse algorithm sends."""
        return max(1, round(self.density * self.work.numel()))

    def bucket(self, *, residual: bool) -> BucketMemory:
        """Returns the memory of a bucket of this size, with a residual of zeros or without one."""
        numel = self.work.numel()
        rows = max(r for r in range(1, math.isqrt(numel) + 1) if numel % r == 0)
        layout = BucketLayout(("gradient",), ((rows, numel // rows),), ((numel // rows, 1),))
        return BucketMemory(0, layout, torch.zeros(numel, dtype=torch.float32) if residual else None)


@dataclass(frozen=True, slots=True)
class Ready:
    """An algorithm that is set up for a case.

    Attributes:
        call: Averages the case's `work` over all ranks. Collective.
        bytes_sent: Returns the bytes that this rank sent in the last call.
        counted: Whether these bytes were counted; otherwise they are the least that the algorithm sends.
    """

    call: Callable[[], object]
    bytes_sent: Callable[[], int]
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A registered algorithm.

    Attributes:
        name: Name in rows and options.
        role: "ours"; "peer", which ours are compared with; "part", a building block of ours, which runs only if it is
            named; or "floor", the computation of the others without communication.
        sparse: Whether it sends a fraction of the elements; otherwise the average is exact.
        prepare: Sets it up for a case; raises `Unavailable` if it cannot run in this job.
    """

    name: str
    role: str
    sparse: bool
    prepare: Callable[[Case], Ready]


ALGORITHMS: dict[str, Algorithm] = {}
"""Registered algorithms by name."""

_Prepare = Callable[[Case], Ready]


def algorithm(name: str, *, role: str, sparse: bool) -> Callable[[_Prepare], _Prepare]:
    """Registers a function that prepares an algorithm. The arguments are attributes of `Algorithm`."""

    def register(prepare: _Prepare) -> _Prepare:
        ALGORITHMS[name] = Algorithm(name, role, sparse, prepare)
        return prepare

    return register


def exchanging(case: Case, collective: str) -> Ready:
    """Prepares complete exchanges, as in training, with one of our collectives; dense ones are in float32."""
    bucket, arena = case.bucket(residual=method_named(collective).needs_residual), Arena()
    compressor = compressor_for(collective, case.density)
    values = ValueCodec.FP32 if collective == "dense" else _VALUES
    k = compressor.k_for(case.work.numel(), 0)
    plan = Plan(step=0, collective=collective, compressor=compressor, k=k, value_codec=values)
    last = BucketReport(bucket=0, step=0, numel=case.work.numel())

    def call() -> None:
        nonlocal last, plan
        plan = replace(plan, step=plan.step + 1)
        last = case.world.engine.call("bench", lambda channel: exchange(channel, bucket, case.work, plan, arena))

    return Ready(call, lambda: last.bytes_sent, counted=True)


for _name, _method in methods().items():  # every collective that a SparseState accepts
    algorithm(_name, role="ours", sparse=_method.needs_residual)(partial(exchanging, collective=_name))


def _summing(case: Case, allreduce: Callable[..., CollectiveSteps[None]], **options: Any) -> Ready:
    """Prepares a dense sum alone, as peers do it: the ranks do not check that they agree about its operands."""
    arena, sent = Arena(), 0

    def steps(channel: Channel) -> CollectiveSteps[int]:
        yield from allreduce(channel, DenseSum(case.work, scale=1.0 / case.world.size), arena, "bench", **options)
        return channel.traffic.bytes_sent

    def call() -> None:
        nonlocal sent
        sent = case.world.engine.call("bench", steps)

    return Ready(call, lambda: sent, counted=True)


@algorithm("dense sum", role="ours", sparse=False)
def _dense_sum(case: Case) -> Ready:
    return _summing(case, dense_allreduce)


@algorithm("mpi allreduce", role="peer", sparse=False)
def _mpi_allreduce(case: Case) -> Ready:
    world, work = case.world, case.work
    if world.transport != "mpi":
        raise Unavailable(f"the ranks talk over {world.transport}, not MPI: launch with mpirun")
    from sparsecomm.transport.mpi import import_mpi

    MPI = import_mpi()
    buffer = [work.numpy(), MPI.FLOAT]

    def call() -> None:
        # This thread calls MPI itself, without the hand-over to the engine's thread. That is safe because the engine
        # calls MPI only while an exchange is in flight, and none is in flight here.
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
    """The computation of a sparse average without the communication: select, encode, decode, add."""

    def __init__(self, case: Case) -> None:
        numel = case.work.numel()
        self._case = case
        self._bucket = case.bucket(residual=True)
        self._arena = Arena()
        self._codec = choose_index_codec(case.k, numel)
        self._error = torch.empty(case.k, dtype=torch.float32)
        self.payload = torch.empty(max_payload_bytes(self._codec, _VALUES, case.k, numel), dtype=torch.uint8)

    def encode(self) -> int:
        """Selects elements and writes this rank's payload. Returns its length in bytes."""
        case, residual = self._case, self._bucket.residual
        assert residual is not None
        taken = take_some(self._bucket, Incoming(case.work), sc.TopK(density=case.density), case.k, self._arena)
        header = blank_header(case.world.rank, case.world.size, 0, 0, case.work.numel(), Allgather.number)
        header.value_codec, header.index_codec = _VALUES, self._codec
        error = self._error[: taken.values.numel()]
        encode_payload(header, taken.indices, taken.values, self.payload, error)
        kernels.scatter_add(residual, taken.indices, error)
        taken.commit()
        return HEADER_BYTES + header.body_bytes

    def apply(self, payloads: list[torch.Tensor]) -> None:
        """Decodes the payloads, in rank order, and writes their average to the case's `work`."""
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
    """Prepares Gloo's allgather of our payloads. It needs equal lengths, so ranks gather lengths first and then pad."""
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
    """Prepares the computation of a sparse allgather on one rank, which decodes its own payload once for every rank."""
    selecting = _Selecting(case)

    def call() -> None:
        length = selecting.encode()
        selecting.apply([selecting.payload[:length]] * case.world.size)

    return Ready(call, lambda: 0, counted=True)


# --- parts of `dense sum`, for choosing between them (collectives/allreduce_costs.py) -------------------------------


@algorithm("dense sum fp16", role="part", sparse=False)
def _dense_sum_fp16(case: Case) -> Ready:
    return _summing(case, dense_allreduce, wire=ValueCodec.FP16)


@algorithm("dense sum bf16", role="part", sparse=False)
def _dense_sum_bf16(case: Case) -> Ready:
    return _summing(case, dense_allreduce, wire=ValueCodec.BF16)


@algorithm("ring", role="part", sparse=False)
def _ring(case: Case) -> Ready:
    return _summing(case, ring_allreduce, segment=ring_segment(one_host=case.world.engine.transport.one_host))


@algorithm("halving", role="part", sparse=False)
def _halving(case: Case) -> Ready:
    return _summing(case, halving_allreduce)


@algorithm("doubling", role="part", sparse=False)
def _doubling(case: Case) -> Ready:
    return _summing(case, doubling_allreduce)


@algorithm("hand-over", role="part", sparse=False)
def _hand_over(case: Case) -> Ready:
    """Prepares a collective without messages, which costs only the way to the engine's thread and back."""

    def nothing(channel: Channel) -> CollectiveSteps[None]:
        return
        yield

    return Ready(lambda: case.world.engine.call("bench", nothing), lambda: 0, counted=True)
