"""These tests make real labs and must leave nothing behind. They are skipped on machines that cannot make labs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from helpers import job_environment
from labs import Forks, gone

from sparsecomm.tools.lab import missing, survey
from sparsecomm.tools.lab.survey import remove


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    problem = missing()
    if problem:
        pytest.skip(problem)


@pytest.fixture
def name() -> Iterator[str]:
    """A name for labs, which must be gone at the end of the test."""
    made = f"t{os.getpid()}"
    yield made
    left = [lab.name for lab in survey() if lab.name.startswith(made)]
    for one in left:
        remove(one)
    assert not left, f"left behind: {left}"
    assert gone(made)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A server that starts processes with sparsecomm already imported."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in job_environment().items():
        monkeypatch.setenv(key, value)
