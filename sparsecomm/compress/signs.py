"""One bit an element: the signs of what was accumulated, and one scale for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers, SelectorMemory

__all__ = ["Sign", "WholeBucket"]


class WholeBucket(Compressor):
    """What is sent is made of all that was accumulated, by the collective: nothing is selected here."""

    def density_at(self, step: int) -> float:
        """Always 1: no element is left out."""
        return 1.0

    def capacity(self, k: int, numel: int) -> int:
        """Always 0: there are no pairs."""
        return 0

    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        """See `Compressor.select`. Adds the gradient to the residual and takes nothing out."""
        return Selection(nnz=0, nonfinite=kernels.accumulate_dense(grad, residual, scale=scale))


@dataclass(frozen=True)
class Sign(WholeBucket):
    """1-bit signs with error feedback (EF-signSGD, Karimireddy et al. 2019).

    Each rank sends the sign of every accumulated element and their mean magnitude; the average is that of these
    products. 32 times fewer bytes than float32, whatever the gradient.
    """

    collectives: ClassVar[tuple[str, ...]] = ("sign",)
