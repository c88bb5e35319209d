"""The gradient of one shard in a PUSH: a payload, and marks for the parameters that had no gradient.

Torch's optimizers leave a parameter alone whose `.grad` is None: no momentum, no weight decay. A payload does not show
which parameters these are, since zeros are not None and a sparse payload lacks most elements anyway. So a body begins
with marks, if there are any: bit i of them (byte i / 8, the lowest bit first) is set if the worker has no gradient for
piece i of the shard.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol.payloads import Origin, decode
from sparsecomm.types import Pairs

__all__ = ["Gradient", "marks", "read_gradient"]


@dataclass(frozen=True, slots=True)
class Gradient:
    """A worker's gradient of one shard.

    Attributes:
        pairs: Positions in the shard, and the values there.
        nonfinite: Whether the gradient was not finite; `pairs` is then empty.
        absent: Numbers of the pieces for which the worker has no gradient. All values in them are zero.
    """

    pairs: Pairs
    nonfinite: bool = False
    absent: frozenset[int] = frozenset()


def marks(absent: Collection[int], pieces: int) -> torch.Tensor:
    """Returns the marks for a shard of `pieces` pieces, uint8; empty if no piece is absent."""
    size = (pieces + 7) // 8 if absent else 0
    bits = sum(1 << i for i in absent)
    return torch.tensor(list(bits.to_bytes(size, "little")), dtype=torch.uint8)


def read_gradient(origin: Origin, marked: int, body: torch.Tensor) -> Gradient:
    """Reads the body of a PUSH.

    Args:
        origin: The sender, shard and step that the payload must name.
        marked: Number of bytes of marks at the start of the body.
        body: The whole body, uint8.

    Returns:
        The gradient, in new tensors.

    Raises:
        WireError: If anything does not fit. It names field, value, sender and shard.
    """
    absent = _read_marks(origin, body[:marked], marked)
    pairs, nonfinite = decode(origin, body[marked:])
    _check_zero(origin, absent, pairs)
    return Gradient(pairs, nonfinite, absent)


def _read_marks(origin: Origin, data: torch.Tensor, marked: int) -> frozenset[int]:
    pieces = len(origin.spec.pieces)
    if not marked:
        return frozenset()
    if marked != (pieces + 7) // 8 or data.numel() != marked:
        raise _error(origin, "seq", marked, f"marks of {pieces} pieces have {(pieces + 7) // 8} bytes, or 0")
    bits = int.from_bytes(bytes(data.numpy()), "little")
    if bits >> pieces:
        raise _error(origin, "marks", hex(bits), f"the shard has {pieces} pieces")
    return frozenset(i for i in range(pieces) if bits >> i & 1)


def _check_zero(origin: Origin, absent: frozenset[int], pairs: Pairs) -> None:
    """Checks that a gradient is zero in all pieces that it marks as absent."""
    if not absent:
        return
    indices, values = pairs[0].to(torch.int64), pairs[1]
    for number in sorted(absent):
        piece = origin.spec.pieces[number]
        ends = torch.tensor([piece.offset, piece.offset + piece.end - piece.start], dtype=torch.int64)
        low, high = (int(at) for at in torch.searchsorted(indices, ends))
        if bool(values[low:high].any()):
            raise _error(origin, "marks", number, f"{piece.name!r} is marked as without a gradient and has values")


def _error(origin: Origin, field: str, value: object, reason: str) -> WireError:
    return WireError(field, value, reason, rank=origin.rank, bucket=origin.spec.index)
