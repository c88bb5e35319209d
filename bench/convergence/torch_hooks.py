"""Plain DDP and torch's own communication hooks: the methods that compression is compared with."""

from __future__ import annotations

from typing import Any

from options import Settings
from torch import nn

from sparsecomm.tools.benches.methods import METHODS, Attached, powersgd

REGISTERED = {"none": "ddp-gloo", "fp16": "fp16", "silent": "ddp-silent"}  # --compressor: name in METHODS
POWER_TENSORS = ("error_dict", "p_memory_dict", "q_memory_dict")


def attach(settings: Settings, model: nn.Module) -> Attached:
    """Returns the model in DDP with the hook that ``--compressor`` names. Collective."""
    if settings.matrix_rank is not None:
        return powersgd(model, settings.matrix_rank, start=settings.warmup_steps)
    return METHODS[REGISTERED[settings.compressor]].attach(model, 1.0)


def state_dict(attached: Attached) -> dict[str, Any]:
    """Returns what PowerSGD remembers on this rank, for a checkpoint; nothing for the other methods."""
    power = attached.power
    return {} if power is None else {name: getattr(power, name) for name in ("iter", *POWER_TENSORS)}


def load_state_dict(attached: Attached, saved: dict[str, Any]) -> None:
    """Restores the result of ``state_dict``. Mutates the hook's state."""
    for name, value in saved.items():
        setattr(attached.power, name, value)
