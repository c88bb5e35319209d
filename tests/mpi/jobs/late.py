"""late.py HOW [SECONDS]: rank 1 does not come to sparsecomm.init(): it ends, or it sleeps first."""

from __future__ import annotations

import os
import sys
import time

rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"])
if rank == 1:
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    if sys.argv[1] == "end":
        sys.exit(0)

import sparsecomm as sc  # noqa: E402

print(sc.init(), flush=True)
