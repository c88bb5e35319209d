"""Tensors of any dtype and stride as contiguous vectors and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from sparsecomm.errors import ConfigError
from sparsecomm.runtime.kinds import check_plain

__all__ = ["Flat", "check_tensors", "octets", "pieces"]


def octets(vector: torch.Tensor) -> torch.Tensor:
    """Returns the memory of a contiguous vector as uint8, for any dtype."""
    return vector.view(torch.uint8)


def pieces(tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Cuts a tensor along its first dimension into views of these sizes, of which it has enough rows."""
    ends = list(accumulate(sizes))
    return [tensor[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def check_tensors(tensors: Sequence[torch.Tensor], name: str) -> None:
    """Checks that tensors can be sent: plain, in host memory, of one dtype.

    Args:
        tensors: The tensors, any shapes, at least one.
        name: Name of the operation, for messages.

    Raises:
        ConfigError: if they cannot.
    """
    if not tensors:
        raise ConfigError(f"{name}: needs at least one tensor")
    for tensor in tensors:
        check_plain(tensor, f"{name}: a tensor of shape {tuple(tensor.shape)}")
        if not tensor.is_cpu:
            raise ConfigError(f"{name}: a tensor is on {tensor.device}; the backend takes tensors in host memory")
        if tensor.dtype != tensors[0].dtype:
            raise ConfigError(f"{name}: tensors of {tensors[0].dtype} and {tensor.dtype} in one call")


class Flat:
    """The elements of tensors as one contiguous vector. Copies only what does not lie in memory like that.

    Args:
        tensors: Tensors of one dtype, any shapes and strides, at least one.
        read: Whether to fill a copy with the elements. False for tensors that are only written.

    Attributes:
        vector: All elements, shape (n,), in the order of the tensors. May share their memory.
    """

    __slots__ = ("_copied", "_tensors", "vector")

    def __init__(self, tensors: Sequence[torch.Tensor], *, read: bool = True) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        first = self._tensors[0]
        in_place = len(tensors) == 1 and first.is_contiguous() and not first.is_conj() and not first.is_neg()
        self._copied = not in_place
        if in_place:
            self.vector = first.view(-1)
            return
        self.vector = torch.empty(sum(t.numel() for t in self._tensors), dtype=first.dtype)
        if read:
            for part, tensor in self._parts():
                part.copy_(tensor)

    @property
    def octets(self) -> torch.Tensor:
        """The memory of `vector`, as uint8."""
        return octets(self.vector)

    def write(self) -> None:
        """Copies the vector back to the tensors, if it does not share their memory."""
        if self._copied:
            for part, tensor in self._parts():
                tensor.copy_(part)

    def _parts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = pieces(self.vector, [tensor.numel() for tensor in self._tensors])
        return [(part.view(tensor.shape), tensor) for part, tensor in zip(parts, self._tensors, strict=True)]
