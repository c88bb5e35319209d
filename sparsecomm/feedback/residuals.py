"""Residuals of one rank, flat in bucket order, found by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsecomm.errors import StateError
from sparsecomm.feedback.layout import BucketLayout

__all__ = ["ResidualStore", "check_residuals"]


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
