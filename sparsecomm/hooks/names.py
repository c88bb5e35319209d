"""Finding the DDP model that a state was registered with, and its parameters' names."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from sparsecomm.errors import ConfigError

__all__ = ["find_ddp", "parameter_names"]


def find_ddp(state: object) -> DistributedDataParallel | None:
    """Returns the DDP model whose comm hook has this state, or None.

    DDP tells a hook neither the model nor the names of the parameters, so the one list that joins them is looked
    up among live objects, once per state. Passing ``model=`` to the state avoids it.

    Raises:
        ConfigError: if several models share the state.
    """
    found = _registered(state)
    if not found and gc.get_freeze_count():
        # A frozen heap (common advice before workers fork) is not listed.
        gc.unfreeze()
        found = _registered(state)
        gc.freeze()
    if len(found) > 1:
        raise ConfigError(f"one SparseState is registered with {len(found)} DDP models; each needs its own")
    return found[0] if found else None


def _registered(state: object) -> list[DistributedDataParallel]:
    found = []
    for candidate in gc.get_objects():
        if issubclass(type(candidate), DistributedDataParallel):
            hooks: list[tuple[Any, object]] = getattr(candidate, "_comm_hooks", [])
            if any(s is state for _, s in hooks):
                found.append(candidate)
    return found


def parameter_names(model: torch.nn.Module) -> dict[int, str]:
    """Returns {id(parameter): name}, without DDP's "module." so that names fit the plain model's state dict."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {id(p): name for name, p in inner.named_parameters()}
