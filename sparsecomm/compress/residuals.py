"""Residuals of one rank, flat in bucket order, found by parameter name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sparsecomm.errors import StateError

__all__ = ["BucketLayout", "ResidualStore", "check_residuals"]


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


class ResidualStore:
    """Residuals of one rank: flat float32 tensors in bucket order, found by parameter name.

    A parameter's residual is a slice of some bucket's flat tensor. When DDP rebuilds its buckets, the slices are
    copied into the new flat tensors, so that nothing is lost and nothing depends on bucket numbers.
    """

    def __init__(self, what: str = "residual") -> None:
        self._what = what
        self._flat: dict[BucketLayout, torch.Tensor] = {}
        self._where: dict[str, tuple[torch.Tensor, int, BucketLayout, int]] = {}
        self._pending: dict[str, torch.Tensor] = {}

    def names(self) -> set[str]:
        """Returns the names of all parameters that have a residual, loaded ones included."""
        return set(self._where) | set(self._pending)

    def has(self, layout: BucketLayout) -> bool:
        """Returns whether any parameter of this bucket has a residual."""
        return any(n in self._where or n in self._pending for n in layout.names)

    def bucket(self, layout: BucketLayout, device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns the flat residual of a bucket, shape (layout.numel,), creating it (zeros) or moving into it.

        One that is on another device moves to this one.

        Raises:
            StateError: if a loaded residual has another shape than the parameter.
        """
        cached = self._flat.get(layout)
        if cached is not None and cached.device == torch.device(device):
            return cached
        self._check_pending(layout)
        flat = torch.zeros(layout.numel, dtype=torch.float32, device=device)
        offset = 0
        for i, name in enumerate(layout.names):
            here = _shaped(flat, offset, layout, i)
            if name in self._pending:
                here.copy_(self._pending.pop(name))
            elif name in self._where:
                here.copy_(_shaped(*self._where[name]))
            offset += torch.Size(layout.shapes[i]).numel()
        moved = {id(self._where[name][0]) for name in layout.names if name in self._where}
        self._flat = {k: v for k, v in self._flat.items() if id(v) not in moved}
        offset = 0
        for i, name in enumerate(layout.names):
            self._where[name] = (flat, offset, layout, i)
            offset += torch.Size(layout.shapes[i]).numel()
        self._flat[layout] = flat
        return flat

    def _check_pending(self, layout: BucketLayout) -> None:
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            loaded = self._pending.get(name)
            if loaded is not None:
                self._check_shape(name, loaded, shape)

    def _check_shape(self, name: str, loaded: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(loaded.shape) != shape:
            raise StateError(
                f"{self._what} of {name!r} in the checkpoint has shape {tuple(loaded.shape)}, the parameter has {shape}"
            )

    def state(self) -> dict[str, torch.Tensor]:
        """Returns a contiguous copy of every residual in its parameter's shape, by name."""
        views = {name: _shaped(flat, off, lay, i) for name, (flat, off, lay, i) in self._where.items()}
        views.update(self._pending)
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in views.items()}

    def slices(self) -> list[torch.Tensor]:
        """Returns every parameter's residual, as a view."""
        views = [_shaped(flat, offset, layout, i) for flat, offset, layout, i in self._where.values()]
        return views + list(self._pending.values())

    def load(self, residuals: Mapping[str, torch.Tensor]) -> None:
        """Replaces all residuals; parameters that are not named get zeros. Checks everything before it changes.

        Raises:
            StateError: see `check_residuals`; or if one has another shape than its parameter.
        """
        check_residuals(self._what, residuals)
        for name, t in residuals.items():
            if name in self._where and t.shape != (0,):
                _, _, layout, i = self._where[name]
                self._check_shape(name, t, layout.shapes[i])
        for flat in {id(w[0]): w[0] for w in self._where.values()}.values():
            flat.zero_()
        self._pending = {}
        for name, t in residuals.items():
            if not bool(t.any()):
                continue  # what a dense bucket saves must not give it a residual
            if name in self._where:
                flat, offset, layout, i = self._where[name]
                _shaped(flat, offset, layout, i).copy_(t)
            else:
                self._pending[name] = t.detach().cpu().clone()


def check_residuals(what: str, residuals: Mapping[str, torch.Tensor]) -> None:
    """Checks what is to be loaded or resharded.

    Args:
        what: "residual" or "velocity", for the message.
        residuals: by parameter name; an empty one stands for none.

    Raises:
        StateError: if one is not float32, not dense, or not finite; names it.
    """
    for name, t in residuals.items():
        if not isinstance(t, torch.Tensor) or t.dtype != torch.float32 or t.layout != torch.strided:
            kind = f"{t.dtype}, {t.layout}" if isinstance(t, torch.Tensor) else type(t).__name__
            raise StateError(f"{what} of {name!r} must be a float32 tensor, got {kind}")
        if not bool(torch.isfinite(t).all()):
            raise StateError(f"{what} of {name!r} holds non-finite values")


def _shaped(flat: torch.Tensor, offset: int, layout: BucketLayout, i: int) -> torch.Tensor:
    """Returns the i-th parameter's slice of a flat bucket as a view in that parameter's shape."""
    shape, stride = layout.shapes[i], layout.strides[i]
    if stride is None:
        return flat[offset : offset + torch.Size(shape).numel()].view(shape)
    return flat.as_strided(shape, stride, flat.storage_offset() + offset)
