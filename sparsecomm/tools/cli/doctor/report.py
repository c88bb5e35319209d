"""The report of doctor: plain data, gathered by `collect`, judged by `checks`, printed by `render` or as JSON.

The JSON object of `sparsecomm doctor --json` has the fields of `Report` and "ok"; docs/doctor.md documents them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = [
    "Cpu",
    "Kernels",
    "LaunchFacts",
    "Level",
    "Mpi",
    "Mpirun",
    "Network",
    "Problem",
    "Rank",
    "Rdma",
    "Report",
    "Threads",
    "Torch",
    "Ucx",
    "World",
]

Level = Literal["error", "warning", "hint"]


@dataclass(frozen=True)
class Problem:
    """Something to fix.

    Attributes:
        section: Name of the field of `Report` that it concerns.
        level: "error" (training will fail or be very slow), "warning" (probably unintended) or "hint".
        what: The problem in one sentence.
        fix: A command to paste into a shell.
    """

    section: str
    level: Level
    what: str
    fix: str


@dataclass(frozen=True)
class LaunchFacts:
    """How this process was started, according to `sparsecomm.launch.detect`.

    Attributes:
        launcher: Name of the launcher, as in `sparsecomm.launch.Launch`.
        rank: Rank of this process.
        size: Number of processes.
        mpi: Whether the processes meet over MPI.
        root: Whether the user is root.
        root_allowed: Whether the environment lets Open MPI run as root.
        problem: Why the launcher's variables are inconsistent, or None.
    """

    launcher: str
    rank: int
    size: int
    mpi: bool
    root: bool
    root_allowed: bool
    problem: str | None = None


@dataclass(frozen=True)
class Mpirun:
    """An mpirun on this machine.

    Attributes:
        path: Its path.
        on_path: Whether the command `mpirun` runs this one.
        family: "Open MPI", "MPICH", "Intel MPI" or "unknown".
        version: Its version; "" if unknown.
        matches: Whether its family and version are those of the MPI library; None if unknown.
    """

    path: str
    on_path: bool
    family: str
    version: str
    matches: bool | None


@dataclass(frozen=True)
class Mpi:
    """The MPI library that mpi4py loads.

    Attributes:
        family: "Open MPI", "MPICH", "Intel MPI" or "unknown"; None if no library loads.
        version: Version of the library.
        standard: Version of the MPI standard, such as "3.1".
        library: Path of the shared library; None if unknown.
        thread_level: "SINGLE", "FUNNELED", "SERIALIZED" or "MULTIPLE"; None if MPI could not be initialized.
        pml: Messaging layer that Open MPI uses: "ob1", "ucx" or "cm"; None if unknown.
        cuda_aware: Whether the library can send GPU memory; None if unknown.
        components: Open MPI's components by framework, from ompi_info: {"pml": [...], "osc": [...], ...}.
        mpiruns: All mpiruns found, the one on PATH first.
        problem: Why MPI cannot be used, or None.
    """

    family: str | None = None
    version: str = ""
    standard: str = ""
    library: str | None = None
    thread_level: str | None = None
    pml: str | None = None
    cuda_aware: bool | None = None
    components: dict[str, list[str]] = field(default_factory=dict)
    mpiruns: list[Mpirun] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Rank:
    """A rank's description of itself.

    Attributes:
        rank: Number of the rank.
        host: Name of its host.
        python: Version of Python.
        sparsecomm: Version of sparsecomm.
        torch: Version of torch.
        mpi: Family and version of the MPI library; "" if the ranks talk over Gloo.
        kernels: Kernel path in use, or "unusable".
        threads: Number of torch's threads.
        cpus: Cores that the rank may run on, a bit mask in hexadecimal.
    """

    rank: int
    host: str
    python: str
    sparsecomm: str
    torch: str
    mpi: str
    kernels: str
    threads: int
    cpus: str


@dataclass(frozen=True)
class World:
    """Whether the ranks found each other.

    Attributes:
        over: "MPI" or "Gloo"; None in a world of one.
        expected: Number of ranks that the launcher started.
        met: Number of ranks that met; None if they did not meet.
        ranks: Descriptions of the ranks, in rank order.
        problem: Why they did not meet, or None.
    """

    over: str | None = None
    expected: int = 1
    met: int | None = None
    ranks: list[Rank] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Ucx:
    """UCX, the library through which MPI reaches RDMA.

    Attributes:
        version: Version of UCX; None if it is not installed.
        library: Path of libucp.
        transports: Devices by transport, such as {"rc_verbs": ["mlx5_0:1"], "tcp": ["eth0"]}.
        in_mpi: Open MPI's frameworks that can use UCX, of "pml" and "osc".
        problem: Why UCX could not be examined, or None.
    """

    version: str | None = None
    library: str | None = None
    transports: dict[str, list[str]] = field(default_factory=dict)
    in_mpi: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Rdma:
    """A port of an RDMA device: its name ("mlx5_0:1"), state ("ACTIVE"), rate ("100 Gb/sec (4X EDR)"), link layer."""

    name: str
    state: str
    rate: str
    link_layer: str


@dataclass(frozen=True)
class Network:
    """A network interface that is up: name, speed in Mbit/s (None if unknown), MTU in bytes."""

    name: str
    speed: int | None
    mtu: int


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        model: Name of the processor.
        cores: Number of logical cores of the machine.
        usable: Number of cores that this process may run on.
        simd: Instruction sets that the kernels use, best first.
        shm_free: Free bytes in /dev/shm, through which ranks of one node talk; None if it does not exist.
        memlock: Bytes that this process may lock, which RDMA needs; None for no limit.
    """

    model: str
    cores: int
    usable: int
    simd: list[str]
    shm_free: int | None
    memlock: int | None


@dataclass(frozen=True)
class Kernels:
    """The compute kernels.

    Attributes:
        path: Kernel path in use; None if the path that SPARSECOMM_KERNELS names cannot run.
        available: Paths that can run here, fastest first.
        requested: Value of SPARSECOMM_KERNELS, or None.
        native: Whether the C++ kernels are loaded.
        problem: Why the C++ kernels are missing, or None.
        request_problem: Why SPARSECOMM_KERNELS cannot be honoured, or None.
        compiler: Path of a C++ compiler; None if there is none.
        checkout: Whether this is a source checkout rather than an installed wheel.
    """

    path: str | None
    available: list[str]
    requested: str | None
    native: bool
    problem: str | None
    request_problem: str | None
    compiler: str | None
    checkout: bool


@dataclass(frozen=True)
class Torch:
    """PyTorch: version, torch.distributed and its backends, GPUs by name, and whether an NVIDIA driver is loaded."""

    version: str
    distributed: bool
    gloo: bool
    nccl: bool
    cuda: str | None
    gpus: list[str]
    nvidia_driver: bool


@dataclass(frozen=True)
class Threads:
    """Compute threads on this node.

    Attributes:
        omp_num_threads: Value of OMP_NUM_THREADS, or None.
        torch: Number of torch's threads in this rank.
        node_ranks: Number of ranks on this node.
        node_threads: Number of torch's threads in all of these ranks together.
        node_cores: Number of cores that they may use together.
    """

    omp_num_threads: str | None
    torch: int
    node_ranks: int
    node_threads: int
    node_cores: int


@dataclass(frozen=True)
class Report:
    """All findings of doctor. `versions` and `environment` map names to values; `timeout` is in seconds."""

    versions: dict[str, str]
    launch: LaunchFacts
    world: World
    mpi: Mpi
    ucx: Ucx
    rdma: list[Rdma]
    network: list[Network]
    cpu: Cpu
    kernels: Kernels
    torch: Torch
    threads: Threads
    timeout: float | None
    timeout_problem: str | None
    environment: dict[str, str]
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no problem of level "error"."""
        return all(p.level != "error" for p in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON-ready data."""
        return {"ok": self.ok, **asdict(self)}
