"""Every test that takes `path` runs on each kernel path that this machine has, against the reference.

Triton's interpreter is left out, because it takes milliseconds a block; test_triton.py has fewer and smaller cases.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparsecomm import kernels

FAST = tuple(p for p in kernels.available_paths() if p not in ("reference", "triton"))


@pytest.fixture(params=FAST or ("reference",))
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    kernels.set_path(request.param)
    yield request.param
    kernels.set_path(None)
