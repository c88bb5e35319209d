"""Runs one suite on every rank: `mpirun -n 3 python -m pytest tests/mpi`. Plain pytest runs it in a world of one.

All ranks collect the same tests. After each test the ranks tell each other whether they passed it, so that a failure
on one rank is a failure on all of them and the next test starts together.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparsecomm as sc
from sparsecomm.exchange import config
from sparsecomm.launch import detect

_passed = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Gives each rank a private temporary folder, because all ranks would clean up pytest's shared one at once."""
    if detect().size > 1 and config.option.basetemp is None:
        folder = tempfile.TemporaryDirectory(prefix="sparsecomm-tests-")
        config.add_cleanup(folder.cleanup)
        config.option.basetemp = os.path.join(folder.name, "pytest")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps every second case of each test function if SPARSECOMM_SUITE_HALF is 0 (from the first one on) or 1.

    A function with one case is in both halves.
    """
    half = os.environ.get("SPARSECOMM_SUITE_HALF", "")
    if not half:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(item) for of_one in cases.values() for item in (of_one[int(half) :: 2] or of_one)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(scope="session")
def world() -> sc.World:
    """The world of all ranks; stays up until the process ends."""
    gc.freeze()  # a state searches live objects for its DDP model; leave it only those of the tests
    return sc.init(timeout=float(os.environ.get("SPARSECOMM_TIMEOUT", "60")))


@pytest.fixture(scope="session", autouse=True)
def several_buckets() -> Iterator[None]:
    """Tiny models have several buckets; they stay apart unless a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "FUSE_BYTES", 0)
        yield


@pytest.fixture(scope="session")
def outcomes(world: sc.World) -> Any:
    """A process group whose timeout is longer than a collective's: one rank may fail at once, another by timeout."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * world.engine.timeout))


@pytest.fixture(autouse=True)
def in_step(request: pytest.FixtureRequest, world: sc.World, outcomes: Any) -> Iterator[None]:
    """Starts every test with the same seed on all ranks and ends it with the same outcome."""
    torch.manual_seed(1234)
    yield
    mine = torch.tensor([int(request.node.stash.get(_passed, False))], dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(everyone, mine, group=outcomes)
    failed = [r for r, passed in enumerate(everyone) if not passed]
    if failed and world.rank not in failed:
        pytest.fail(f"failed on rank {', '.join(map(str, failed))}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remembers whether the test itself passed (or skipped itself, alike on all ranks)."""
    report = yield
    if report.when == "call":
        item.stash[_passed] = not report.failed
    return report


def pytest_report_header() -> str:
    """Says which rank this output is of."""
    launch = detect()
    return f"rank {launch.rank} of {launch.size}, started by {launch.launcher}"
