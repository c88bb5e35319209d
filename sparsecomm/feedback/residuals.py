"""The residuals of one rank, stored by parameter name and flat in bucket order."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsecomm.errors import StateError
from sparsecomm.feedback.layout import BucketLayout
from sparsecomm.runtime.kinds import tensor_problem

__all__ = ["ResidualStore", "check_residuals"]


class ResidualStore:
    """The residuals of one rank, or other tensors of the same form, such as velocities.

    The residual of a parameter is a slice of the flat float32 tensor of a bucket. When DDP rebuilds its buckets, the
    slices are copied into new flat tensors. So no residual is lost, and none depends on bucket numbers.

    Args:
        noun: name of such a tensor in errors.

    Attributes:
        version: changes whenever a bucket's flat tensor is made, since parameters may then have left an older one.
    """

    def __init__(self, noun: str = "residual") -> None:
        self._noun = noun
        self.version = 0
        self._flat: dict[BucketLayout, torch.Tensor] = {}
        self._places: dict[str, tuple[torch.Tensor, int, BucketLayout, int]] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._views: tuple[int, dict[str, torch.Tensor]] | None = None  # and the version that they are of

    def names(self) -> set[str]:
        """Returns the names of all parameters with a residual, including those that were only loaded."""
        return set(self._places) | set(self._pending)

    def has(self, layout: BucketLayout) -> bool:
        """Returns whether any parameter of this bucket has a residual."""
        return any(n in self._places or n in self._pending for n in layout.names)

    def bucket(self, layout: BucketLayout, device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns the flat residual of a bucket, float32, shape (layout.numel,).

        On the first call for a layout or device, it is created from the residuals of the parameters, with zeros for
        parameters without one. From then on it holds the residuals of these parameters.

        Raises:
            StateError: a loaded residual has another shape than its parameter.
        """
        cached = self._flat.get(layout)
        if cached is not None and cached.device == torch.device(device):
            return cached
        self._check_pending(layout)
        self.version += 1
        flat = torch.zeros(layout.numel, dtype=torch.float32, device=device)
        offset = 0
        for i, name in enumerate(layout.names):
            here = layout.view(flat, offset, i)
            if name in self._pending:
                here.copy_(self._pending.pop(name))
            elif name in self._places:
                here.copy_(self._view(name))
            offset += torch.Size(layout.shapes[i]).numel()
        moved = {id(self._places[name][0]) for name in layout.names if name in self._places}
        self._flat = {k: v for k, v in self._flat.items() if id(v) not in moved}
        offset = 0
        for i, name in enumerate(layout.names):
            self._places[name] = (flat, offset, layout, i)
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
                f"{self._noun} of {name!r} in the checkpoint has shape {tuple(loaded.shape)}, the parameter has {shape}"
            )

    def state(self) -> dict[str, torch.Tensor]:
        """Returns a contiguous copy of every residual, in the shape of its parameter, by name."""
        views = {name: lay.view(flat, off, i) for name, (flat, off, lay, i) in self._places.items()}
        views.update(self._pending)
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in views.items()}

    def views(self) -> dict[str, torch.Tensor]:
        """Returns a view of every residual in the shape of its parameter, by name, loaded ones included."""
        if self._views is None or self._views[0] != self.version:
            views = {name: self._view(name) for name in self._places}
            self._views = (self.version, views | {n: t for n, t in self._pending.items() if t.shape != (0,)})
        return self._views[1]

    def _view(self, name: str) -> torch.Tensor:
        flat, offset, layout, i = self._places[name]
        return layout.view(flat, offset, i)

    def slices(self) -> list[torch.Tensor]:
        """Returns a view of every residual."""
        views = [layout.view(flat, offset, i) for flat, offset, layout, i in self._places.values()]
        return views + list(self._pending.values())

    def check(self, residuals: Mapping[str, torch.Tensor]) -> None:
        """Checks what `load` is given.

        Raises:
            StateError: a residual fails `check_residuals` or has another shape than its parameter.
        """
        check_residuals(self._noun, residuals)
        for name, t in residuals.items():
            if name in self._places and t.shape != (0,):
                _, _, layout, i = self._places[name]
                self._check_shape(name, t, layout.shapes[i])

    def load(self, residuals: Mapping[str, torch.Tensor]) -> None:
        """Replaces all residuals; those of parameters without an entry become zero. Checks all before changing any.

        Args:
            residuals: by parameter name. They are copied.

        Raises:
            StateError: as `check`.
        """
        self.check(residuals)
        for flat in {id(w[0]): w[0] for w in self._places.values()}.values():
            flat.zero_()
        self._pending = {}
        self.version += 1
        for name, t in residuals.items():
            if not bool(t.any()):
                continue  # a dense bucket must not get a residual from its checkpoint
            if name in self._places:
                flat, offset, layout, i = self._places[name]
                layout.view(flat, offset, i).copy_(t)
            else:
                self._pending[name] = t.detach().cpu().clone()


def check_residuals(noun: str, residuals: Mapping[str, object]) -> None:
    """Checks residuals before they are loaded or resharded.

    Args:
        noun: name of such a tensor in errors, such as "residual" or "velocity".
        residuals: by parameter name; an empty tensor means no residual.

    Raises:
        StateError: a residual is not float32, not dense or not finite. The error names it.
    """
    for name, t in residuals.items():
        if not isinstance(t, torch.Tensor) or t.dtype != torch.float32 or t.layout != torch.strided:
            kind = f"{t.dtype}, {t.layout}" if isinstance(t, torch.Tensor) else type(t).__name__
            raise StateError(f"{noun} of {name!r} must be a float32 tensor, got {kind}")
        problem = tensor_problem(t)
        if problem is not None:
            raise StateError(f"{noun} of {name!r} {problem}: it must be a plain float32 tensor")
        if not bool(torch.isfinite(t).all()):
            raise StateError(f"{noun} of {name!r} holds non-finite values")
