"""The part of a parameter that this rank holds, where a model is sharded over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

__all__ = ["WHOLE", "Place", "local_part", "place_of"]


class Place(NamedTuple):
    """Which of the shards of a model a rank holds.

    Attributes:
        shard: number of the shard, from 0.
        shards: number of shards; 1 for a whole model.
    """

    shard: int
    shards: int

    def __str__(self) -> str:
        """Returns the place as errors name it."""
        return f"shard {self.shard} of {self.shards}"


WHOLE = Place(0, 1)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the elements of a tensor that this rank holds: a DTensor's local tensor, any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def place_of(tensor: torch.Tensor) -> Place:
    """Returns this rank's place among the shards of a DTensor on a mesh of one dimension; `WHOLE` for other tensors."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is None or mesh.ndim != 1 or not tensor.placements[0].is_shard():  # type: ignore[attr-defined]
        return WHOLE
    return Place(mesh.get_local_rank(), mesh.size())
