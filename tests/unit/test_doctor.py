"""`sparsecomm doctor` reports good and broken installations correctly, and never hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, job_environment, mpirun_command
from rich.console import Console

from sparsecomm.tools.cli.doctor import ucx
from sparsecomm.tools.cli.doctor.checks import judged
from sparsecomm.tools.cli.doctor.probe import identify
from sparsecomm.tools.cli.doctor.render import render
from sparsecomm.tools.cli.doctor.report import (
    Cpu,
    Kernels,
    LaunchFacts,
    Mpi,
    Mpirun,
    Network,
    Problem,
    Rank,
    Rdma,
    Report,
    Threads,
    Torch,
    Ucx,
    World,
)


def doctor(
    *options: str, path: Path | None = None, launcher: tuple[str, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs doctor; modules in the folder `path` take precedence over all others."""
    clean = {k: v for k, v in job_environment().items() if not k.startswith(("SPARSECOMM_", "UCX_"))}
    pythonpath = os.pathsep.join(str(p) for p in (path, ROOT) if p)
    return subprocess.run(
        [*launcher, sys.executable, "-m", "sparsecomm", "doctor", *options],
        env={**clean, "PYTHONPATH": pythonpath, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def stub(folder: Path, module: str, text: str) -> Path:
    """Makes a module with this text in a folder and returns the folder."""
    (folder / module).parent.mkdir(parents=True, exist_ok=True)
    (folder / module).write_text(text)
    return folder


def problems(report: Mapping[str, Any], section: str) -> list[tuple[str, str]]:
    return [(p["level"], p["fix"]) for p in report["problems"] if p["section"] == section]


# --- whole runs, in a subprocess


def test_json_has_the_documented_keys_and_nothing_else_is_printed() -> None:
    done = doctor("--json")
    report = json.loads(done.stdout)
    documented = (ROOT / "docs" / "doctor.md").read_text()
    for key, value in report.items():
        assert f"`{key}`" in documented
        for inner in value if isinstance(value, dict) and key not in ("environment",) else ():
            assert f"`{inner}`" in documented, (key, inner)
    assert report["launch"]["launcher"] == "python"
    assert report["mpi"]["thread_level"] == "MULTIPLE"
    assert report["versions"]["mpi4py"] != "missing"
    assert done.returncode == (0 if report["ok"] else 1)
    assert report["ok"] == all(p["level"] != "error" for p in report["problems"])


def test_without_mpi4py_and_native_kernels_it_names_both_and_the_fixes(tmp_path: Path) -> None:
    stub(tmp_path, "mpi4py/__init__.py", 'raise ImportError("stubbed out")')
    stub(tmp_path, "sitecustomize.py", 'import sys\nsys.modules["sparsecomm._core"] = None\n')
    done = doctor("--json", path=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["mpi"]["family"] is None
    assert "stubbed out" in report["mpi"]["problem"]
    assert report["kernels"]["path"] == "reference"
    [(level, fix)] = problems(report, "mpi")
    assert level == "error"
    assert "pip install" in fix
    [(level, fix)] = problems(report, "kernels")
    assert level == "error"
    assert "install" in fix


def test_an_mpi_that_hangs_does_not_hang_it_and_bad_settings_are_errors_in_the_text(tmp_path: Path) -> None:
    stub(tmp_path, "mpi4py/__init__.py", "import time\ntime.sleep(600)")
    start = time.monotonic()
    done = doctor("--timeout", "2", path=tmp_path, SPARSECOMM_KERNELS="nonsense", SPARSECOMM_TIMEOUT="soon")
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert "no answer within 2 s" in done.stdout
    for expected in ("'nonsense'", "unset SPARSECOMM_KERNELS", "'soon'", "unset SPARSECOMM_TIMEOUT"):
        assert expected in done.stdout


def test_under_mpirun_rank_0_alone_reports_that_all_ranks_met() -> None:
    done = doctor("--json", launcher=tuple(mpirun_command(2)))
    report = json.loads(done.stdout)  # one object: the other rank is silent
    assert (report["launch"]["rank"], report["launch"]["size"]) == (0, 2)
    assert report["world"]["met"] == 2
    assert [r["rank"] for r in report["world"]["ranks"]] == [0, 1]
    assert report["threads"]["node_ranks"] == 2
    assert done.returncode == (0 if report["ok"] else 1)


def test_a_launcher_of_another_mpi_is_an_error() -> None:
    # A rank that a foreign mpirun started sees its variables, but no server answers.
    done = doctor("--json", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["world"]["met"] == 1
    [(level, fix)] = problems(report, "world")
    assert level == "error"
    assert "-n 2" in fix


# --- the checks, on made-up reports

CPU = Cpu(model="made up", cores=8, usable=8, simd=["avx2"], shm_free=1 << 30, memlock=None)
GOOD = Report(
    versions={"sparsecomm": "1", "python": "3", "torch": "2", "numpy": "2", "mpi4py": "4"},
    launch=LaunchFacts("python", 0, 1, mpi=False, root=False, root_allowed=False),
    world=World(),
    mpi=Mpi(
        family="Open MPI",
        version="5.0.11",
        standard="3.1",
        thread_level="MULTIPLE",
        mpiruns=[Mpirun("/opt/bin/mpirun", True, "Open MPI", "5.0.11", True)],
    ),
    ucx=Ucx(version="1.20.1", transports={"rc_verbs": ["mlx5_0:1"], "tcp": ["eth0"]}, in_mpi=["pml", "osc"]),
    rdma=[Rdma("mlx5_0:1", "ACTIVE", "100 Gb/sec", "InfiniBand")],
    network=[Network("eth0", 10_000, 1500)],
    cpu=CPU,
    kernels=Kernels("avx2", ["avx2", "portable", "reference"], None, True, None, None, "/usr/bin/c++", False),
    torch=Torch("2", True, True, False, None, [], False),
    threads=Threads("1", 1, 1, 1, 8),
    timeout=300.0,
    timeout_problem=None,
    environment={},
)


def ranks(*hosts: str, **other: str) -> World:
    """Returns a world of ranks on these hosts; the last rank has the different facts `other`."""
    same = {"python": "3", "sparsecomm": "1", "torch": "2", "mpi": "Open MPI 5.0.11", "kernels": "avx2"}
    found = [Rank(rank=i, host=h, threads=1, cpus="ff", **same) for i, h in enumerate(hosts)]
    return World("MPI", len(hosts), len(hosts), [*found[:-1], replace(found[-1], **other)])


def with_mpi(**changes: Any) -> Report:
    return replace(GOOD, mpi=replace(GOOD.mpi, **changes))


def with_threads(**changes: Any) -> Report:
    return replace(GOOD, threads=replace(GOOD.threads, **changes))


FOREIGN = Mpirun("/usr/bin/mpirun", True, "MPICH", "4.0", False)
BESIDE = Mpirun("/venv/bin/mpirun", False, "Open MPI", "5.0.11", True)
UNDER_SRUN = LaunchFacts("srun", 0, 2, mpi=True, root=False, root_allowed=False)
UNDER_MPIRUN = LaunchFacts("mpirun (Open MPI)", 0, 2, mpi=True, root=False, root_allowed=False)

CASES: dict[str, tuple[Report, str, str, str]] = {
    "thread level too low": (with_mpi(thread_level="FUNNELED"), "error", "FUNNELED", "pip install"),
    "MPI does not start": (with_mpi(thread_level=None, problem="killed"), "error", "does not start: killed", "python"),
    "a setting may be why": (
        replace(with_mpi(thread_level=None, problem="killed"), environment={"UCX_TLS": "x"}),
        "error",
        "killed",
        "unset UCX_TLS",
    ),
    "pml ucx without RDMA": (
        replace(with_mpi(thread_level=None, problem="x"), environment={"OMPI_MCA_pml": "ucx"}, rdma=[]),
        "error",
        "pml ucx",
        "opal_common_ucx_tls=any",
    ),
    "foreign mpirun": (with_mpi(mpiruns=[FOREIGN, BESIDE]), "warning", "MPICH 4.0", 'PATH="/venv/bin:'),
    "mpirun not on PATH": (with_mpi(mpiruns=[BESIDE]), "hint", "/venv/bin/mpirun", 'PATH="/venv/bin:'),
    "no mpirun": (with_mpi(mpiruns=[]), "warning", "no mpirun", "pip install"),
    "root": (
        replace(GOOD, launch=replace(GOOD.launch, root=True)),
        "warning",
        "root",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
    ),
    "ranks do not meet": (
        replace(GOOD, launch=UNDER_MPIRUN, world=World("MPI", 2, None, problem="no answer within 60 s")),
        "error",
        "no answer within 60 s",
        "btl_tcp_if_include eth0",
    ),
    "ranks of MPICH do not meet": (
        replace(with_mpi(family="MPICH"), launch=UNDER_MPIRUN, world=World("MPI", 2, None, problem="no answer")),
        "error",
        "no answer",
        "-iface eth0 -genv UCX_NET_DEVICES eth0",
    ),
    "srun of another protocol": (
        replace(with_mpi(family="Intel MPI"), launch=UNDER_SRUN, world=World("MPI", 2, 1, problem="MPI sees 1")),
        "error",
        "MPI sees 1",
        "srun --mpi=pmi2 -n 2",
    ),
    "nodes differ": (replace(GOOD, world=ranks("a", "b", torch="1.9")), "error", "1.9 on rank 1 (b)", "torch==2"),
    "one node is slow": (replace(GOOD, world=ranks("a", "b", kernels="reference")), "error", "rank 1 on b", "doctor"),
    "RDMA port down": (
        replace(GOOD, rdma=[*GOOD.rdma, Rdma("mlx5_1:1", "DOWN", "", "")]),
        "hint",
        "mlx5_1:1 is DOWN",
        "rdma link show mlx5_1/1",
    ),
    "UCX sees no RDMA": (replace(GOOD, ucx=replace(GOOD.ucx, transports={"tcp": []})), "warning", "UCX", "rdma-core"),
    "RDMA left idle": (replace(with_mpi(pml="ob1"), launch=UNDER_MPIRUN), "hint", "ob1", "--mca pml ucx"),
    "little lockable memory": (replace(GOOD, cpu=replace(CPU, memlock=65536)), "warning", "64 KiB", "ulimit -l"),
    "little shared memory": (replace(GOOD, cpu=replace(CPU, shm_free=1 << 20)), "warning", "1 MiB", "--shm-size"),
    "slower kernels forced": (
        replace(GOOD, kernels=replace(GOOD.kernels, path="portable", requested="portable")),
        "warning",
        "SPARSECOMM_KERNELS=portable",
        "unset",
    ),
    "no Gloo": (replace(GOOD, torch=replace(GOOD.torch, gloo=False)), "error", "Gloo", "pip install"),
    "GPU unused": (replace(GOOD, torch=replace(GOOD.torch, nvidia_driver=True)), "hint", "NVIDIA", "pytorch.org"),
    "too many threads": (
        with_threads(node_ranks=2, node_threads=16),
        "warning",
        "16 compute threads on 8 cores",
        "OMP_NUM_THREADS=4",
    ),
    "more ranks than cores": (with_threads(node_ranks=16, node_threads=16), "hint", "16 ranks share 8", "-n 8"),
    "ranks bound to few cores": (
        with_threads(node_ranks=4, node_threads=4, node_cores=2),
        "warning",
        "bound to 2 of 8",
        "--bind-to none",
    ),
    "Intel MPI binds whatever --bind-to says": (
        replace(with_threads(node_ranks=4, node_threads=4, node_cores=2), mpi=with_mpi(family="Intel MPI").mpi),
        "warning",
        "bound to 2 of 8",
        "I_MPI_PIN=0",
    ),
    "each rank bound to one core": (
        replace(GOOD, cpu=replace(CPU, usable=1), world=ranks("a", "a"), threads=Threads("1", 1, 2, 2, 2)),
        "hint",
        "bound to one core",
        "--bind-to none",
    ),
}


def test_a_good_report_has_no_problems() -> None:
    assert judged(GOOD).problems == []
    assert judged(replace(GOOD, launch=UNDER_MPIRUN, world=ranks("a", "b"))).problems == []


@pytest.mark.parametrize("name", CASES)
def test_each_check_sees_its_problem_and_only_that(name: str) -> None:
    report, level, what, fix = CASES[name]
    [problem] = judged(report).problems
    assert problem.level == level
    assert what in problem.what
    assert fix in problem.fix
    assert judged(report).ok == (level != "error")


def test_missing_kernels_without_a_compiler_get_a_line_that_installs_one() -> None:
    k = replace(GOOD.kernels, native=False, path="reference", available=["reference"], compiler=None, problem="gone")
    [problem] = judged(replace(GOOD, kernels=k)).problems
    assert "SLOW" in problem.what
    assert " && " in problem.fix


@pytest.mark.parametrize("change", [lambda r: r, *[lambda r, n=name: CASES[n][0] for name in CASES]])
def test_every_report_can_be_shown_and_fixes_are_never_wrapped(change: Callable[[Report], Report]) -> None:
    report = judged(change(GOOD))
    out = StringIO()
    render(report, Console(file=out, width=60))
    for problem in report.problems:
        assert problem.fix in out.getvalue()
    json.dumps(report.as_json())


def test_problems_come_worst_first() -> None:
    broken = replace(with_mpi(thread_level="SINGLE", mpiruns=[BESIDE]), cpu=replace(CPU, shm_free=0))
    assert [p.level for p in judged(broken).problems] == ["error", "warning", "hint"]
    assert isinstance(judged(broken).problems[0], Problem)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Open MPI v5.0.11, package: Open MPI user@localhost, ident: 5.0.11", ("Open MPI", "5.0.11")),
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to", ("Open MPI", "4.1.4")),
        ("MPICH Version:      5.0.2\nMPICH Release date:", ("MPICH", "5.0.2")),
        ("HYDRA build details:\n    Version:          4.0\n", ("MPICH", "4.0")),
        ("Intel(R) MPI Library 2021.13 for Linux* OS\n", ("Intel MPI", "2021.13")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240515", ("Intel MPI", "2021.13")),
        ("", ("unknown", "")),
        ("slurm 23.1", ("unknown", "")),
    ],
)
def test_mpi_libraries_and_launchers_are_recognized(text: str, expected: tuple[str, str]) -> None:
    assert identify(text) == expected


def test_a_library_that_is_not_loaded_is_not_found() -> None:
    assert ucx.loaded_library("libnonsense.so") is None
    assert ucx.loaded_library("libtorch") is not None
