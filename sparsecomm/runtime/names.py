"""Names of parameters as in the model's state dict, whatever wraps its layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["named_plainly", "plain_name"]

_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})
"""What activation checkpointing, FSDP and torch.compile call the layer that they wrap."""


def plain_name(name: str) -> str:
    """Returns a parameter's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_plainly(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields the parameters of a model with their plain names, in the model's order."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter
