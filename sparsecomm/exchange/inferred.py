"""What the elements that some ranks sent tell about the same elements of the ranks that did not send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecomm.feedback import Alignment
from sparsecomm.types import Pairs

__all__ = ["InferredSum", "infer_sum"]


@dataclass(frozen=True, slots=True)
class InferredSum:
    """The sum of what was sent and of what the other ranks are expected to hold, element by element.

    Attributes:
        positions: int64, shape (m,), positions that any rank sent, ascending.
        sums: float32, shape (m,), sums over all ranks, sent or expected.
        expected: float32, shape (m,), the part of one rank that did not send the element. It leaves that rank's
            residual, so that nothing is counted twice.
        places: int64, for each rank the places in `positions` of what it sent.
    """

    positions: torch.Tensor
    sums: torch.Tensor
    expected: torch.Tensor
    places: Sequence[torch.Tensor]

    def not_sent(self, rank: int) -> Pairs:
        """Returns positions (int64) and expected elements that a rank did not send."""
        others = torch.ones(self.positions.shape, dtype=torch.bool, device=self.positions.device)
        others[self.places[rank]] = False
        return self.positions[others], self.expected[others]


def infer_sum(parts: Sequence[Pairs], alignment: Alignment, ranks: int) -> InferredSum:
    """Returns the inferred sum of sparse vectors, the same on all ranks, bit for bit.

    The residuals of P ranks are taken as a common part plus independent noise of each rank. The share c of the common
    part in the squared norm follows from the alignment a of the residuals: c = (a - 1/P) / (1 - 1/P). If q ranks sent
    an element, with mean m, the common part is expected to be m q c / (q c + 1 - c): all of m if residuals agree, and 0
    if they are noise. Without it, a direction that all ranks agree on takes effect only when the last of them has sent
    it, and until then in P small steps.

    Args:
        parts: positions (uint32, ascending) and values (float32) that each rank sent, in rank order.
        alignment: how far the ranks agree, the same on all ranks.
        ranks: number of ranks P.
    """
    where = torch.cat([indices.to(torch.int64) for indices, _ in parts])
    positions, found = torch.unique(where, return_inverse=True)
    places = torch.split(found, [values.numel() for _, values in parts])
    sums = torch.zeros(positions.shape, device=positions.device, dtype=torch.float32)
    count = torch.zeros_like(sums)
    for place, (_, values) in zip(places, parts, strict=True):
        sums.index_add_(0, place, values)  # no place twice, so that the order is that of the ranks on a GPU, too
        count.index_add_(0, place, torch.ones_like(values))
    common = alignment.common_share()
    expected = sums * (common / (count * common + (1.0 - common)))
    return InferredSum(positions, sums + (ranks - count) * expected, expected, places)
