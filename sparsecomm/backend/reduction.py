"""torch's reduce operations on vectors of any dtype, and the dtype in which they accumulate.

Parts are combined in the order of ranks by the rank that owns the result, so all ranks get the same bits. Floats of 16
and 8 bits accumulate in float32 and are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsecomm.errors import ConfigError

__all__ = ["Reduction"]

_Fold = Callable[[torch.Tensor, torch.Tensor], Any]
_FOLDS: dict[str, _Fold] = {
    "SUM": torch.Tensor.add_,
    "AVG": torch.Tensor.add_,
    "PREMUL_SUM": torch.Tensor.add_,
    "PRODUCT": torch.Tensor.mul_,
    "MIN": lambda acc, part: torch.minimum(acc, part, out=acc),
    "MAX": lambda acc, part: torch.maximum(acc, part, out=acc),
    "BAND": torch.Tensor.bitwise_and_,
    "BOR": torch.Tensor.bitwise_or_,
    "BXOR": torch.Tensor.bitwise_xor_,
}
_BITWISE = {"BAND", "BOR", "BXOR"}
_OF_BOOL = {"SUM": "BOR", "MAX": "BOR", "PRODUCT": "BAND", "MIN": "BAND"}
"""What an operation on bool means, whose bytes must stay 0 or 1."""
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""torch adds few unsigned integers; sums, products and bits of the signed ones are the same in two's complement."""


class Reduction:
    """A reduce operation on one dtype between a number of ranks.

    Args:
        op: torch's ReduceOp, or its type.
        dtype: Dtype of the tensors.
        size: Number of ranks.

    Attributes:
        name: Name of the operation, e.g. "SUM".
        dtype: Dtype of the tensors.
        size: Number of ranks.

    Raises:
        ConfigError: if the dtype has no such operation.
    """

    def __init__(self, op: Any, dtype: torch.dtype, size: int) -> None:
        kind = getattr(op, "op", op)
        self.name: str = kind.name
        self.dtype, self.size = dtype, size
        self._factor: Any = op.__getstate__()[1] if self.name == "PREMUL_SUM" else None
        known = _OF_BOOL.get(self.name, self.name) if dtype == torch.bool else self.name
        self._as = _SIGNED.get(dtype, dtype)
        self._check(known)
        self._fold = _FOLDS[known]
        self._wide = self._as
        if dtype.is_floating_point and dtype.itemsize < 4:
            self._wide = torch.float32
        elif dtype == torch.complex32:
            self._wide = torch.complex64

    def _check(self, known: str) -> None:
        floats = self.dtype.is_floating_point or self.dtype.is_complex
        bad = (
            known not in _FOLDS
            or (known in _BITWISE and floats)
            or (known in ("MIN", "MAX") and (self.dtype.is_complex or self.dtype in _SIGNED))
            or (known in ("AVG", "PREMUL_SUM") and (self.dtype == torch.bool or self.dtype in _SIGNED))
        )
        if bad:
            raise ConfigError(f"the reduce operation {self.name} does not exist for {self.dtype}")

    @property
    def is_float32_sum(self) -> bool:
        """Whether it is a sum or an average in float32, for which there are algorithms of its own."""
        return self.dtype == torch.float32 and self.name in ("SUM", "AVG")

    def combine(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Combines one vector of each rank.

        Args:
            parts: The vectors by rank, shape (n,), of the operation's dtype.
            out: Shape (n,). Overwritten with the result. May share memory with parts.
        """
        total = self._widened(parts[0], copy=True)
        for part in parts[1:]:
            self._fold(total, self._widened(part))
        if self.name == "AVG":
            whole = not (self.dtype.is_floating_point or self.dtype.is_complex)
            total.div_(len(parts), rounding_mode="trunc") if whole else total.div_(len(parts))
        out.view(self._as).copy_(total)

    def _widened(self, part: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
        wide = part.view(self._as).to(self._wide, copy=copy)
        return wide if self._factor is None else wide * self._factor
