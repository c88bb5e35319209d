"""Settings shared by all tests; the folder of this file is importable, so tests say `from helpers import ...`."""

from __future__ import annotations

import importlib.util
import os

import torch
from hypothesis import HealthCheck, settings

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # Read when triton is first imported, by whatever test: then its kernels run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
# SPARSECOMM_TEST_DTYPE=float64 (or bfloat16) makes it torch's default dtype, as a script may; `make dtypes` does so.
torch.set_default_dtype(getattr(torch, os.environ.get("SPARSECOMM_TEST_DTYPE", "float32")))
common = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("sparsecomm", common, max_examples=25)
settings.register_profile("deep", common, max_examples=2000)  # for a bug hunt: pytest --hypothesis-profile=deep
settings.load_profile("sparsecomm")
