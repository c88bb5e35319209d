"""The examples and the convergence study import the files beside them; the tests import these too."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "mpi_examples"), str(ROOT / "bench" / "convergence")]
