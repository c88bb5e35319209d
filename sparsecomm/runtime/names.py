"""Names of parameters as in the model's state dict, whatever wraps its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

__all__ = ["localized", "named_plainly", "plain_name"]

_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})
"""What activation checkpointing, FSDP and torch.compile call the layer that they wrap."""


def plain_name(name: str) -> str:
    """Returns a parameter's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_plainly(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields the parameters of a model with their plain names, in the model's order."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter


def localized(model: torch.nn.Module, own: Iterable[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields DDP's parameters that the model holds as DTensors in its forward pass, with their plain names.

    Under tensor parallelism DDP gives a model local tensors as parameters. The first forward pass replaces them by
    DTensors over the same memory, which are attributes of the layers and no parameters any more. So memory is what
    tells the names, at whatever time one looks.

    Args:
        model: the model inside of DDP.
        own: parameters that DDP reduces and the model does not list.
    """
    found: dict[tuple[int, int, torch.Size], list[str]] = {}
    wanted = list(own)
    for prefix, layer in model.named_modules() if wanted else ():
        for name, value in vars(layer).items():
            local = getattr(value, "_local_tensor", None) if isinstance(value, torch.Tensor) else None
            if local is not None:
                found.setdefault(_place(local), []).append(plain_name(f"{prefix}.{name}" if prefix else name))
    for tensor in wanted:
        names = found.get(_place(tensor))
        if names:
            yield names.pop(0), tensor


def _place(tensor: torch.Tensor) -> tuple[int, int, torch.Size]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.shape
