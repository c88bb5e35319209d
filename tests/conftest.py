"""Settings shared by all tests; the folder of this file is importable, so tests say `from helpers import ...`."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
common = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("sparsecomm", common, max_examples=25)
settings.register_profile("deep", common, max_examples=2000)  # for a bug hunt: pytest --hypothesis-profile=deep
settings.load_profile("sparsecomm")
