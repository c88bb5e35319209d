"""A compressor for each exchange method: its selections are what the method can exchange."""

from __future__ import annotations

from collections.abc import Callable

from sparsecomm.compress import ChunkTopK, Compressor, CyclicTopK, Dense, PowerSGD, Sign, TopK

__all__ = ["compressor_for"]

_MADE_FOR: dict[str, Callable[[float], Compressor]] = {
    "chunked": ChunkTopK,
    "dense": lambda _: Dense(),
    "powersgd": lambda _: PowerSGD(),
    "shared_index": CyclicTopK,
    "sign": lambda _: Sign(),
}


def compressor_for(method: str, density: float) -> Compressor:
    """Returns a compressor of this density, where it has one, for an exchange method.

    Args:
        method: its name.
        density: in (0, 1].
    """
    return _MADE_FOR.get(method, TopK)(density)
