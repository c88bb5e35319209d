"""Buffers that are reused from step to step. After warm-up a step allocates nothing that grows with n."""

from __future__ import annotations

from collections.abc import Hashable

import torch

__all__ = ["Arena"]


_NOTHING = (-1, torch.empty(0, dtype=torch.float32))


class Arena:
    """Buffers by key, which only grow. Used by one thread.

    Args:
        device: Device of the buffers.
        pinned: Whether to pin the memory, so that a GPU copies to and from it asynchronously.

    Attributes:
        allocations: Number of allocations so far.
        allocated_bytes: Bytes of all buffers now.
    """

    def __init__(self, device: torch.device | str = "cpu", *, pinned: bool = False) -> None:
        self._device = torch.device(device)
        self._pinned = pinned
        self._buffers: dict[tuple[Hashable, torch.dtype], torch.Tensor] = {}
        # The last view of each key and its size. Most keys are used with the same size in every step.
        self._views: dict[tuple[Hashable, torch.dtype], tuple[int, torch.Tensor]] = {}
        self.allocations = 0
        self.allocated_bytes = 0

    def get(self, key: Hashable, numel: int, dtype: torch.dtype, *, reserve: int = 0) -> torch.Tensor:
        """Returns a 1-D tensor of exactly `numel` elements. It still has the content of its last use.

        A key and a dtype have the same memory on every call until a larger size is requested. Then the arena allocates
        a quarter more than requested, or `reserve` elements if that is more.
        """
        name = (key, dtype)
        size, view = self._views.get(name, _NOTHING)
        if size == numel:
            return view
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._grow(key, max(numel + numel // 4, reserve), dtype)
        view = buffer[:numel]
        self._views[name] = (numel, view)
        return view

    def _grow(self, key: Hashable, numel: int, dtype: torch.dtype) -> torch.Tensor:
        old = self._buffers.get((key, dtype))
        with torch.inference_mode(False):  # the engine is in it, and other threads may not write to what is made there
            buffer = torch.empty(numel, dtype=dtype, device=self._device, pin_memory=self._pinned)
        self._buffers[(key, dtype)] = buffer
        self.allocations += 1
        self.allocated_bytes += buffer.nbytes - (0 if old is None else old.nbytes)
        return buffer

    def clear(self) -> None:
        """Releases all memory."""
        self._buffers.clear()
        self._views.clear()
        self.allocated_bytes = 0
