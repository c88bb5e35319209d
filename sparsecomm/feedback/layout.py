"""Which parameters lie where in a flat bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["BucketLayout"]


@dataclass(frozen=True)
class BucketLayout:
    """Which parameters lie where in a flat bucket.

    Attributes:
        names: parameter names in bucket order.
        shapes: their shapes.
        strides: their strides, by which the flat slice is read back into the parameter's shape.
        numel: total number of elements.
        hash: 64 bits that are equal on all ranks iff names, shapes and memory orders are.
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
        """Returns the layout hash: cheap, since buckets are looked up at every step."""
        return self.hash

    @classmethod
    def of(cls, named: Sequence[tuple[str, torch.Tensor]]) -> BucketLayout:
        """Builds the layout of parameters in bucket order.

        DDP lays a dense non-overlapping parameter (a channels-last one too) into the bucket in its own memory
        order, so its strides are kept; any other is laid out contiguously.
        """
        return cls(
            names=tuple(name for name, _ in named),
            shapes=tuple(tuple(p.shape) for _, p in named),
            strides=tuple(tuple(p.stride()) if _is_dense(p) else None for _, p in named),
        )

    def slowest(self, i: int) -> int:
        """Returns the length of the i-th parameter's dimension that is slowest in memory; all of it, if it has but one.

        Dimensions of length 1 do not count.
        """
        order = _memory_order(self.shapes[i], self.strides[i])
        return self.shapes[i][order[0]] if order else 1


def _memory_order(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the dimensions from the slowest to the fastest; those of length 1 have no place in it."""
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    return tuple(dims if stride is None else sorted(dims, key=lambda d: -stride[d]))


def _is_dense(p: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(p))
