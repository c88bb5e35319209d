"""Which launcher is recognised from which environment, and what contradictory ones say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.errors import ConfigError, LaunchError
from sparsecomm.launch import Launch, default_timeout, detect
from sparsecomm.launch.world import _given_link
from sparsecomm.transport import Link

OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}
SRUN_PMI2 = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "PMI_RANK": "2", "PMI_SIZE": "4"}
SBATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}  # the batch script itself is no rank
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {**BY_HAND, "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch("python", 0, 1, 0, transport="solo")),
        (OMPI, Launch("mpirun (Open MPI)", 1, 4, 1, transport="mpi")),
        (MPICH, Launch("mpirun or srun (MPICH or Intel MPI)", 2, 4, 0, transport="mpi")),
        (SRUN, Launch("srun", 3, 4, 1, transport="mpi")),
        (SRUN_PMI2, Launch("mpirun or srun (MPICH or Intel MPI)", 2, 4, None, transport="mpi")),
        (SBATCH, Launch("python", 0, 1, 0, transport="solo")),
        (TORCHRUN, Launch("torchrun", 1, 2, 0, transport="gloo")),
        (BY_HAND, Launch("environment", 1, 2, None, transport="gloo")),
        ({**OMPI, **SRUN}, Launch("mpirun (Open MPI)", 1, 4, 1, transport="mpi")),
        ({**OMPI, **BY_HAND}, Launch("mpirun (Open MPI)", 1, 4, 1, transport="mpi")),
        ({**SRUN, **BY_HAND}, Launch("srun", 3, 4, 1, transport="mpi")),
        ({**SRUN, **TORCHRUN}, Launch("torchrun", 1, 2, 0, transport="gloo")),
        ({**OMPI, **TORCHRUN}, Launch("torchrun", 1, 2, 0, transport="gloo")),
        ({k: v for k, v in OMPI.items() if "LOCAL" not in k}, Launch("mpirun (Open MPI)", 1, 4, None, transport="mpi")),
        ({"OMPI_COMM_WORLD_RANK": "0"}, Launch("python", 0, 1, 0, transport="solo")),
        ({"WORLD_SIZE": "1"}, Launch("python", 0, 1, 0, transport="solo")),
        ({"MASTER_ADDR": "x", "MASTER_PORT": "1"}, Launch("python", 0, 1, 0, transport="solo")),
    ],
)
def test_the_innermost_launcher_wins(environ: dict[str, str], expected: Launch) -> None:
    assert detect(environ) == expected


@pytest.mark.parametrize("base", [OMPI, MPICH, SRUN, TORCHRUN, BY_HAND], ids=lambda b: next(iter(b)))
@pytest.mark.parametrize("text", ["", "one", "1.5", "-", "0x1", " "])
def test_a_number_that_is_none_is_named_with_its_value(base: dict[str, str], text: str) -> None:
    names = [n for n in base if n.endswith(("RANK", "SIZE", "PROCID", "TASKS", "LOCALID", "RANKID"))]
    for name in names:
        with pytest.raises(LaunchError) as caught:
            detect({**base, name: text})
        assert f"{name} = {text!r}" in str(caught.value)


@pytest.mark.parametrize("base", [OMPI, MPICH, SRUN, TORCHRUN, BY_HAND], ids=lambda b: next(iter(b)))
@pytest.mark.parametrize(("rank", "size"), [("4", "4"), ("9", "2"), ("-1", "4"), ("0", "0"), ("0", "-3")])
def test_a_rank_outside_its_world_is_refused(base: dict[str, str], rank: str, size: str) -> None:
    names = list(base)
    with pytest.raises(LaunchError, match=f"rank {rank} of {size}"):
        detect({**base, names[0]: rank, names[1]: size})


@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["MASTER_PORT"], ["MASTER_ADDR", "MASTER_PORT"]], ids=" ".join)
def test_a_world_without_an_address_is_an_error_that_names_what_is_missing(missing: list[str]) -> None:
    """Never a silent world of one on every rank."""
    with pytest.raises(LaunchError) as caught:
        detect({k: v for k, v in BY_HAND.items() if k not in missing})
    assert all(name in str(caught.value) for name in missing)


@pytest.mark.parametrize(
    ("present", "absent", "value"),
    [
        ("WORLD_SIZE", "RANK", "2"),
        ("RANK", "WORLD_SIZE", "1"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "4"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "3"),
        ("PMI_RANK", "PMI_SIZE", "1"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "1"),
    ],
)
def test_half_of_a_world_is_an_error_that_names_both_variables(present: str, absent: str, value: str) -> None:
    with pytest.raises(LaunchError, match=f"{present} = {value} is set, but not {absent}"):
        detect({present: value, "MASTER_ADDR": "x", "MASTER_PORT": "1"})
    assert detect({**OMPI, present: value}).size == 4, "a launcher that says everything comes first"


def test_a_world_of_one_by_hand_needs_no_address() -> None:
    launch = detect({"RANK": "0", "WORLD_SIZE": "1"})
    assert (launch.rank, launch.size, launch.mpi) == (0, 1, False)


@given(
    st.dictionaries(
        st.sampled_from(sorted({**OMPI, **MPICH, **SRUN, **TORCHRUN})), st.sampled_from(["0", "1", "2", "4", "x"])
    )
)
def test_any_environment_gives_a_consistent_launch_or_a_launch_error(environ: dict[str, str]) -> None:
    try:
        launch = detect(environ)
    except LaunchError:
        return
    assert 0 <= launch.rank < launch.size
    assert launch.size == 1 or launch.launcher != "python"


@pytest.mark.parametrize(("text", "seconds"), [(None, 300.0), ("5", 5.0), ("0.5", 0.5), ("1e3", 1000.0)])
def test_the_timeout_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str | None, seconds: float
) -> None:
    monkeypatch.delenv("SPARSECOMM_TIMEOUT", raising=False)
    if text is not None:
        monkeypatch.setenv("SPARSECOMM_TIMEOUT", text)
    assert default_timeout() == seconds


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_bad_timeout_is_refused_by_name_and_value(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SPARSECOMM_TIMEOUT", text)
    with pytest.raises(ConfigError) as caught:
        default_timeout()
    assert f"SPARSECOMM_TIMEOUT = {text!r}" in str(caught.value)


def test_the_environment_gives_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSECOMM_LINK", raising=False)
    assert _given_link() is None
    monkeypatch.setenv("SPARSECOMM_LINK", "1e-4, 8e-9")
    assert _given_link() == Link(1e-4, 8e-9)


@pytest.mark.parametrize("text", ["", "1e-4", "1e-4,0", "-1,8e-9", "nan,1", "1,inf", "fast,slow", "1,2,3"])
def test_a_bad_link_is_refused_by_name_and_value(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SPARSECOMM_LINK", text)
    with pytest.raises(ConfigError, match="SPARSECOMM_LINK") as caught:
        _given_link()
    assert repr(text) in str(caught.value)
