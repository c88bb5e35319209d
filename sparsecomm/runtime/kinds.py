"""Kinds of tensors that cannot be exchanged."""

from __future__ import annotations

import torch

from sparsecomm.errors import ConfigError

__all__ = ["check_plain", "tensor_problem"]


def tensor_problem(tensor: torch.Tensor) -> str | None:
    """Returns what is wrong with the kind of a tensor, as in "is a DTensor"; None for a plain tensor.

    Plain are `torch.Tensor`, `torch.nn.Parameter` and its subclasses, as long as they do not dispatch by themselves:
    only then are the elements where the strides say they are.
    """
    kind = type(tensor)
    plain = kind is torch.Tensor or issubclass(kind, torch.nn.Parameter)
    if not plain or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {kind.__name__}"
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.is_quantized:
        return "is a quantized tensor"
    if tensor.is_meta:
        return "is on the meta device, without values"
    if tensor.layout != torch.strided:
        return f"is in {tensor.layout} layout; build the embedding with sparse=False"
    return None


def check_plain(tensor: torch.Tensor, what: str) -> None:
    """Checks that a tensor is plain.

    Raises:
        ConfigError: if it is not; the text starts with `what`.
    """
    problem = tensor_problem(tensor)
    if problem is not None:
        raise ConfigError(f"{what} {problem}: only plain tensors can be exchanged")
