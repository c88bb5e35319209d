"""Buffers that are reused from step to step, so that a warmed-up step allocates nothing that grows with n."""

from __future__ import annotations

from collections.abc import Hashable

import torch

__all__ = ["Arena"]


_NOTHING = (-1, torch.empty(0))


class Arena:
    """Named buffers that only grow. Used by one thread.

    Args:
        device: where they are.
        pinned: whether a GPU copies to and from them by itself.

    Attributes:
        allocations: how many times memory was taken from the system.
        allocated_bytes: bytes held now.
    """

    def __init__(self, device: torch.device | str = "cpu", *, pinned: bool = False) -> None:
        self._device = torch.device(device)
        self._pinned = pinned
        self._buffers: dict[tuple[Hashable, torch.dtype], torch.Tensor] = {}
        # What was last returned, by key: most keys are asked for the same size in every step.
        self._views: dict[tuple[Hashable, torch.dtype], tuple[int, torch.Tensor]] = {}
        self.allocations = 0
        self.allocated_bytes = 0

    def get(self, key: Hashable, numel: int, dtype: torch.dtype, *, reserve: int = 0) -> torch.Tensor:
        """Returns a 1-D tensor of exactly `numel` elements; its content is whatever the last user left.

        The memory of a key is the same on every call until a larger size is asked for. Then a quarter of headroom is
        added, or memory for `reserve` elements is taken if that is more.
        """
        name = (key, dtype)
        held, view = self._views.get(name, _NOTHING)
        if held == numel:
            return view
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._grow(key, max(numel + numel // 4, reserve), dtype)
        view = buffer[:numel]
        self._views[name] = (numel, view)
        return view

    def _grow(self, key: Hashable, numel: int, dtype: torch.dtype) -> torch.Tensor:
        old = self._buffers.get((key, dtype))
        buffer = torch.empty(numel, dtype=dtype, device=self._device, pin_memory=self._pinned)
        self._buffers[(key, dtype)] = buffer
        self.allocations += 1
        self.allocated_bytes += buffer.nbytes - (0 if old is None else old.nbytes)
        return buffer

    def clear(self) -> None:
        """Gives all memory back."""
        self._buffers.clear()
        self._views.clear()
        self.allocated_bytes = 0
