"""The parameters of a flat bucket and their places in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["BucketLayout"]


@dataclass(frozen=True)
class BucketLayout:
    """The parameters of a flat bucket and their places in it.

    Attributes:
        names: names of the parameters, in bucket order.
        shapes: shapes of the parameters.
        strides: strides with which a flat slice is viewed in the parameter's shape; None for a contiguous slice.
        numel: total number of elements.
        hash: 64-bit hash of names, shapes and memory orders.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...] | None, ...]
    numel: int = field(init=False)
    hash: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", sum(torch.Size(s).numel() for s in self.shapes))
        orders = tuple(_memory_order(s, t) for s, t in zip(self.shapes, self.strides, strict=True))
        text = repr((self.names, tuple(tuple(s) for s in self.shapes), orders)).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        object.__setattr__(self, "hash", int.from_bytes(digest, "little"))

    def __hash__(self) -> int:
        """Returns `hash`, which costs nothing, since layouts are dictionary keys in every step."""
        return self.hash

    @classmethod
    def of(cls, named: Sequence[tuple[str, torch.Tensor]]) -> BucketLayout:
        """Returns the layout of parameters given in bucket order.

        DDP stores a dense non-overlapping parameter, also a channels-last one, in the memory order of the parameter, so
        its strides are kept. It stores any other parameter contiguously.
        """
        return cls(
            names=tuple(name for name, _ in named),
            shapes=tuple(tuple(p.shape) for _, p in named),
            strides=tuple(tuple(p.stride()) if _is_dense(p) else None for _, p in named),
        )

    def view(self, flat: torch.Tensor, start: int, i: int) -> torch.Tensor:
        """Returns the slice of parameter i, which begins at `start`, as a view in its shape and memory order."""
        shape, stride = self.shapes[i], self.strides[i]
        if stride is None:
            return flat[start : start + torch.Size(shape).numel()].view(shape)
        return flat.as_strided(shape, stride, flat.storage_offset() + start)

    def find(self, position: int) -> tuple[int, int]:
        """Returns the number of the parameter at a position of the flat vector, and the position inside it."""
        for i, shape in enumerate(self.shapes):
            numel = torch.Size(shape).numel()
            if position < numel:
                return i, position
            position -= numel
        raise IndexError(f"position {position} lies behind the last parameter")

    def slowest(self, i: int) -> int:
        """Returns the length of the dimension of parameter i that is slowest in memory.

        Dimensions of length 1 do not count. If no dimension remains, the result is 1.
        """
        order = _memory_order(self.shapes[i], self.strides[i])
        return self.shapes[i][order[0]] if order else 1


def _memory_order(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the dimensions from the slowest to the fastest in memory, without those of length 1."""
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    return tuple(dims if stride is None else sorted(dims, key=lambda d: -stride[d]))


def _is_dense(p: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(p))
