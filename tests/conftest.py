"""Settings shared by all tests; the folder of this file is importable, so tests say `from helpers import ...`."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "sparsecomm", deadline=None, max_examples=25, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sparsecomm")
