"""Prints a report for people: a line or two per section, then the problems, each with a command that fixes it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsecomm.tools.cli.doctor.report import Report

__all__ = ["render"]

_MARKS = {"error": ("ERROR", "bold red"), "warning": ("warn", "yellow"), "hint": ("hint", "cyan")}
_MANY = 6  # hosts or interfaces that get a line each; the others are counted


def render(report: Report, console: Console) -> None:
    """Prints the report."""
    versions = report.versions
    others = ", ".join(f"{name} {value}" for name, value in versions.items() if name != "sparsecomm")
    console.print(f"[bold]sparsecomm {versions['sparsecomm']}[/]  ({others})\n", highlight=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for section, title, lines in _sections(report):
        table.add_row(_mark(report, section), title, Text("\n".join(lines)))
    console.print(table)
    _problems(report, console)


def _sections(r: Report) -> Iterator[tuple[str, str, list[str]]]:
    """Yields the sections: name as in `Problem.section`, title, lines."""
    yield "launch", "Launch", [_launch(r)]
    if r.world.over:
        yield "world", "Ranks", list(_world(r))
    yield "mpi", "MPI", list(_mpi(r))
    yield "ucx", "UCX", list(_ucx(r))
    yield "rdma", "RDMA", list(_rdma(r))
    yield "network", "Network", list(_network(r))
    yield "cpu", "CPU", [_cpu(r)]
    yield "kernels", "Kernels", [_kernels(r)]
    yield "torch", "torch", [_torch(r)]
    yield "threads", "Threads", [_threads(r)]
    yield "timeout", "Timeout", [_timeout(r)]
    settings = [f"{name}={value}" for name, value in r.environment.items()]
    if settings:
        yield "environment", "Settings", settings


def _mark(r: Report, section: str) -> Text:
    """Returns the mark of a section: its worst problem's level, "?" if it could not be examined, or "ok"."""
    level = next((p.level for p in r.problems if p.section == section), None)
    if level:
        return Text(*_MARKS[level])
    # A section that could not be examined is not ok, even if the problem is listed under another section.
    unknown = (section == "world" and r.world.problem) or (section == "ucx" and r.ucx.problem)
    return Text("?", "dim") if unknown else Text("ok", "green")


def _launch(r: Report) -> str:
    if r.launch.problem:
        return r.launch.problem
    if r.launch.launcher == "python":
        return "plain python, a world of one rank (use mpirun, srun or torchrun for more)"
    return f"{r.launch.launcher}, rank {r.launch.rank} of {r.launch.size}"


def _world(r: Report) -> Iterator[str]:
    world = r.world
    if world.met != world.expected:
        yield world.problem or "the ranks did not meet"
        return
    hosts: dict[str, list[int]] = {}
    for rank in world.ranks:
        hosts.setdefault(rank.host, []).append(rank.rank)
    nodes = "1 node" if len(hosts) == 1 else f"{len(hosts)} nodes"
    yield f"all {world.met} met over {world.over} on {nodes}"
    for host, ranks in list(hosts.items())[:_MANY]:
        yield f"{host}: rank {', '.join(map(str, ranks))}"
    if len(hosts) > _MANY:
        yield f"and {len(hosts) - _MANY} more"


def _mpi(r: Report) -> Iterator[str]:
    mpi = r.mpi
    if mpi.family is None:
        yield "none"
    else:
        level = "does not start" if mpi.problem else "waits for other ranks"
        if mpi.thread_level:
            level = f"provides MPI_THREAD_{mpi.thread_level}"
        yield f"{mpi.family} {mpi.version} (MPI {mpi.standard}), {level}"
        yield f"library  {mpi.library or 'unknown'}"
        in_use = [f"messages through pml {mpi.pml}"] if mpi.pml else []
        if mpi.cuda_aware is not None:
            in_use.append("CUDA-aware" if mpi.cuda_aware else "not CUDA-aware (GPU memory goes through the host)")
        if in_use:
            yield ", ".join(in_use)
    for m in mpi.mpiruns:
        belongs = {True: ", same MPI", False: ", DIFFERENT MPI", None: ""}[m.matches]
        yield f"mpirun   {m.path} ({m.family} {m.version}{belongs}{', on PATH' if m.on_path else ''})"


def _ucx(r: Report) -> Iterator[str]:
    ucx = r.ucx
    if ucx.version is None:
        yield ucx.problem or "none"
        return
    can = " and ".join(f"{name} ucx" for name in ucx.in_mpi)
    yield f"{ucx.version}, " + (f"in Open MPI as {can}" if can else "unknown whether MPI can use it")
    if ucx.problem:
        yield ucx.problem
    if ucx.transports:
        ways = [name + (f" ({', '.join(d)})" if d != ["memory"] else "") for name, d in ucx.transports.items()]
        yield f"transports: {', '.join(ways)}"


def _rdma(r: Report) -> Iterator[str]:
    for port in r.rdma:
        yield f"{port.name:<8} {port.state}, {port.rate}, {port.link_layer}"
    if not r.rdma:
        yield "no devices; messages between nodes go over TCP"


def _network(r: Report) -> Iterator[str]:
    for link in r.network[:_MANY]:
        speed = "speed unknown" if link.speed is None else f"{link.speed / 1000:g} Gbit/s"
        yield f"{link.name:<8} {speed}, MTU {link.mtu}"
    if len(r.network) > _MANY:
        yield f"and {len(r.network) - _MANY} more"
    if not r.network:
        yield "only the loopback interface is up"


def _cpu(r: Report) -> str:
    cores = f"{r.cpu.cores} cores" + (f" ({r.cpu.usable} for this process)" if r.cpu.usable != r.cpu.cores else "")
    return f"{r.cpu.model}, {cores}, SIMD: {', '.join(r.cpu.simd) or 'none that the kernels use'}"


def _kernels(r: Report) -> str:
    k = r.kernels
    if k.path is None:
        return f"SPARSECOMM_KERNELS={k.requested} cannot be used; available: {', '.join(k.available)}"
    if not k.native:
        return "reference (SLOW); the native kernels are missing"
    why = f"set by SPARSECOMM_KERNELS={k.requested}" if k.requested else f"the fastest of {', '.join(k.available)}"
    return f"native, {k.path} ({why})"


def _torch(r: Report) -> str:
    backends = [name for name, there in (("Gloo", r.torch.gloo), ("NCCL", r.torch.nccl)) if there]
    gpus = "no GPU"
    if r.torch.gpus:
        gpus = f"{len(r.torch.gpus)} GPU: {', '.join(dict.fromkeys(r.torch.gpus))} (CUDA {r.torch.cuda})"
    return f"{r.torch.version}, distributed over {' and '.join(backends) or 'nothing'}, {gpus}"


def _threads(r: Report) -> str:
    t = r.threads
    omp = f"OMP_NUM_THREADS={t.omp_num_threads}" if t.omp_num_threads else "OMP_NUM_THREADS not set"
    ranks = "1 rank" if t.node_ranks == 1 else f"{t.node_ranks} ranks"
    threads = "1 torch thread" if t.node_threads == 1 else f"{t.node_threads} torch threads"
    return f"{ranks} on this node, {threads}, {t.node_cores} cores ({omp})"


def _timeout(r: Report) -> str:
    if r.timeout is None:
        return r.timeout_problem or ""
    source = "SPARSECOMM_TIMEOUT" if "SPARSECOMM_TIMEOUT" in r.environment else "default"
    return f"{r.timeout:g} s until a collective gives up ({source})"


def _problems(report: Report, console: Console) -> None:
    """Prints the problems. Fixes are never wrapped, so that users can copy them."""
    console.print()
    if not report.problems:
        console.print("[green]No problems found.[/]")
    for problem in report.problems:
        name, style = _MARKS[problem.level]
        console.print(Text.assemble((f"{name:<5}", style), "  ", problem.what), soft_wrap=True)
        console.print(Text.assemble(("  fix", "bold"), "  ", (problem.fix, "bold")), soft_wrap=True)
