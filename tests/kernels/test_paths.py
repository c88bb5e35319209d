"""The requested path runs, or an error says why not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparsecomm import kernels
from sparsecomm.errors import ConfigError


def test_every_available_path_can_be_set() -> None:
    for name in kernels.available_paths():
        kernels.set_path(name)
        assert kernels.current_path() == name
    kernels.set_path(None)


def test_an_unknown_path_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'sse9'.*reference"):
        kernels.set_path("sse9")


@pytest.mark.parametrize("name", kernels.available_paths())
def test_the_environment_forces_a_path(name: str) -> None:
    code = "from sparsecomm import kernels as d; print(d.current_path())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SPARSECOMM_KERNELS": name},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == name, done.stderr


def test_the_native_kernels_are_here() -> None:
    """The suite must test them; after a build that failed silently only the reference would run."""
    assert kernels.native_problem() is None
    assert "portable" in kernels.available_paths()
