"""Runs every fuzz test on every kernel path, and counts what was tried, so that the number is a fact and not a hope."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from sparsecomm import kernels

tried: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="session")
def count() -> Counter[tuple[str, str]]:
    """Hostile inputs by kernel path and kind."""
    return tried


@pytest.fixture(scope="module", autouse=True, params=kernels.available_paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernel path in use."""
    kernels.set_path(request.param)
    yield request.param
    kernels.set_path(None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many there were."""
    if tried:
        kinds: Counter[str] = Counter()
        for (_, kind), number in tried.items():
            kinds[kind] += number
        parts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        terminalreporter.write_line(f"hostile payloads tried: {sum(tried.values())} ({parts})")
