"""The vector of a dense allreduce, and how its parts are written, added and finished. Shared by all algorithms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.errors import ConfigError
from sparsecomm.types import ValueCodec

__all__ = ["DenseSum"]


@dataclass(frozen=True, slots=True)
class DenseSum:
    """A dense vector to sum over ranks.

    In 16 bits every rank rounds every element at most once: either in the partial sum that it sends on, or in the
    finished sum that it owns. The rank that rounds knows the rounding error exactly. So nothing is lost as long as
    every rank keeps `error`: sum over ranks of `work` before = work after / scale + sum over ranks of `error`, up to
    float32 rounding.

    Attributes:
        work: float32, shape (n,), contiguous. Mutated by the sum.
        wire: Codec of the values on the wire: FP32, FP16 or BF16. Sums are always float32.
        scale: Factor on the finished sum, positive.
        error: float32, shape (n,), in units of the unscaled sum. Overwritten with the rounding errors of this rank.
            None discards them.

    Raises:
        KernelError: for another wire codec.
        ConfigError: for a scale that is not positive, or for an error of another shape than `work`.
    """

    work: torch.Tensor
    wire: ValueCodec = ValueCodec.FP32
    scale: float = 1.0
    error: torch.Tensor | None = None

    def __post_init__(self) -> None:
        kernels.packed_bytes(self.wire, 0)
        if self.error is not None and self.error.shape != self.work.shape:
            raise ConfigError(f"error has shape {tuple(self.error.shape)}, work {tuple(self.work.shape)}")
        if self.scale <= 0.0:
            raise ConfigError(f"scale must be positive, got {self.scale!r}")

    @property
    def exact(self) -> bool:
        """Whether the bytes on the wire are those of `work`, so that parts need no packing."""
        return self.wire == ValueCodec.FP32

    def nbytes(self, begin: int, end: int) -> int:
        """Returns the bytes of a part on the wire."""
        return kernels.packed_bytes(self.wire, end - begin)

    def view(self, begin: int, end: int) -> torch.Tensor:
        """Returns a part of `work` as bytes, which are those on the wire if the sum is `exact`."""
        return self.work[begin:end].view(torch.uint8)

    def pack(self, begin: int, end: int, out: torch.Tensor) -> None:
        """Packs a part into `out` for the wire and writes the rounding errors to `error`."""
        kernels.pack_dense(self.wire, self.work[begin:end], out, self._error(begin, end))

    def add(self, begin: int, end: int, data: torch.Tensor) -> None:
        """Adds received bytes to a part."""
        kernels.unpack_dense(self.wire, data, self.work[begin:end], add=True)

    def read(self, begin: int, end: int, data: torch.Tensor) -> None:
        """Replaces a part by received bytes."""
        kernels.unpack_dense(self.wire, data, self.work[begin:end])

    def finish(self, begin: int, end: int, out: torch.Tensor | None = None) -> None:
        """Scales a finished sum that this rank owns.

        Args:
            begin: First element of the part.
            end: End of the part.
            out: If given, the part is packed into it, and `work` is rounded to the values that other ranks receive.
        """
        part = self.work[begin:end]
        if self.scale != 1.0:
            part.mul_(self.scale)
        if out is None:
            return
        error = self._error(begin, end)
        kernels.pack_dense(self.wire, part, out, error)
        kernels.unpack_dense(self.wire, out, part)
        if error is not None and self.scale != 1.0:
            error.div_(self.scale)

    def finish_exactly(self) -> None:
        """Scales a finished sum without any rounding to 16 bits, and sets `error` to zero."""
        self.finish(0, self.work.numel())
        if self.error is not None:
            self.error.zero_()

    def _error(self, begin: int, end: int) -> torch.Tensor | None:
        return None if self.error is None else self.error[begin:end]
