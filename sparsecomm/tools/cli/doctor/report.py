"""What doctor finds: plain data, gathered by `collect`, judged by `checks`, shown by `render` or as JSON.

The JSON object of `sparsecomm doctor --json` is `Report` field by field (documented in docs/doctor.md), plus "ok".
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
        section: the part of the report it belongs to, the name of a field of `Report`.
        level: "error" (training will fail or crawl), "warning" (probably not what you want) or "hint".
        what: what is wrong, one sentence.
        fix: a line to paste into a shell.
    """

    section: str
    level: Level
    what: str
    fix: str


@dataclass(frozen=True)
class LaunchFacts:
    """How this process was started, as `sparsecomm.launch.detect` sees it.

    Attributes:
        launcher: see `sparsecomm.launch.Launch`.
        rank: this process.
        size: number of processes.
        mpi: whether they are to find each other over MPI.
        root: whether the user is root.
        root_allowed: whether the environment lets Open MPI run as root.
        problem: why the launcher's variables make no sense, or None.
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
    """An mpirun that was found.

    Attributes:
        path: its path.
        on_path: whether it is the one that a bare `mpirun` runs.
        family: "Open MPI", "MPICH", "Intel MPI" or "unknown".
        version: its version, "" if unknown.
        matches: whether it is of the same family and version as the MPI library; None if that is not known.
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
        version: its version.
        standard: version of the MPI standard, such as "3.1".
        library: path of the shared library, where known.
        thread_level: "SINGLE", "FUNNELED", "SERIALIZED" or "MULTIPLE"; None if MPI could not be initialized.
        pml: Open MPI's messaging layer in use: "ob1", "ucx", "cm"; None if not known.
        cuda_aware: whether the library sends GPU memory; None if it does not say.
        components: Open MPI's components by framework, from ompi_info: {"pml": [...], "osc": [...], ...}.
        mpiruns: every mpirun found, the one on PATH first.
        problem: why MPI cannot be used, or None.
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
    """What one rank says of itself.

    Attributes:
        rank: its number.
        host: its host's name.
        python: Python's version.
        sparsecomm: our version.
        torch: torch's version.
        mpi: the MPI library's family and version, "" where ranks talk over Gloo.
        kernels: the kernel path in use, or "unusable".
        threads: torch's threads.
        cpus: cores that it may run on, a bit mask in hexadecimal.
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
        over: "MPI" or "Gloo"; None if there is no world to find.
        expected: ranks that the launcher started.
        met: ranks that met; None if they did not.
        ranks: what each said, in rank order.
        problem: why they did not meet, or None.
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
        version: None if there is none.
        library: path of libucp.
        transports: devices by transport, such as {"rc_verbs": ["mlx5_0:1"], "tcp": ["eth0"]}.
        in_mpi: which of Open MPI's "pml" and "osc" can use it.
        problem: why it could not be asked, or None.
    """

    version: str | None = None
    library: str | None = None
    transports: dict[str, list[str]] = field(default_factory=dict)
    in_mpi: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Rdma:
    """A port of an RDMA device: "name:port", state ("ACTIVE"), rate ("100 Gb/sec (4X EDR)"), link layer."""

    name: str
    state: str
    rate: str
    link_layer: str


@dataclass(frozen=True)
class Network:
    """A network interface that is up: name, speed in Mbit/s (None if it does not say), MTU in bytes."""

    name: str
    speed: int | None
    mtu: int


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        model: its name.
        cores: logical cores of the machine.
        usable: cores that this process may run on.
        simd: instruction sets that matter to the kernels, best first.
        shm_free: free bytes in /dev/shm, through which ranks of one node talk; None if there is none.
        memlock: bytes that this process may lock, as RDMA needs; None for no limit.
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
        path: the path in use; None if what SPARSECOMM_KERNELS asks for cannot run.
        available: paths that can run here, fastest first.
        requested: SPARSECOMM_KERNELS, or None.
        native: whether the C++ kernels are loaded.
        problem: why the C++ kernels are missing, or None.
        request_problem: why SPARSECOMM_KERNELS cannot be honoured, or None.
        compiler: path of a C++ compiler, None if there is none.
        checkout: whether this is a source checkout rather than an installed wheel.
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
        omp_num_threads: the variable, or None.
        torch: torch's threads in this rank.
        node_ranks: ranks on this node.
        node_threads: torch's threads of all of them.
        node_cores: cores that they may use together.
    """

    omp_num_threads: str | None
    torch: int
    node_ranks: int
    node_threads: int
    node_cores: int


@dataclass(frozen=True)
class Report:
    """All that doctor found. `versions` and `environment` map names to values; `timeout` is in seconds."""

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
        """Whether nothing is wrong at level "error"."""
        return all(p.level != "error" for p in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON-ready data."""
        return {"ok": self.ok, **asdict(self)}
