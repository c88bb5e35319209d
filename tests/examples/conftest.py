"""The examples are scripts that import the helpers beside them; make those importable here too."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "mpi_examples"
sys.path.insert(0, str(EXAMPLES))
