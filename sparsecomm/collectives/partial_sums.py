"""What all dense allreduces share: how parts of the vector are written, added and finished."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.errors import ConfigError
from sparsecomm.types import ValueCodec

__all__ = ["DenseSum"]


@dataclass(slots=True)
class DenseSum:
    """A dense vector that is being summed over ranks.

    In 16 bits every rank rounds every element at most once: the partial sum that it sends on, or the finished sum that
    it owns. It alone knows what that dropped, exactly, so nothing is lost as long as it keeps `error`:
    sum over ranks of `work` before = work after / scale + sum over ranks of `error`.

    Attributes:
        work: float32, shape (n,).
        wire: FP32, FP16 or BF16: how parts travel. Sums are always float32.
        scale: factor on the finished sum.
        error: float32, shape (n,), in units of the unscaled sum; overwritten with what this rank's rounding dropped.
            None to forget it.
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
        """Whether parts travel as they are, so that they need no packing."""
        return self.wire == ValueCodec.FP32

    def nbytes(self, begin: int, end: int) -> int:
        """Bytes of a part on the wire."""
        return kernels.packed_bytes(self.wire, end - begin)

    def view(self, begin: int, end: int) -> torch.Tensor:
        """The bytes of a part of `work` itself: what travels if `exact`."""
        return self.work[begin:end].view(torch.uint8)

    def pack(self, begin: int, end: int, out: torch.Tensor) -> None:
        """Writes a part as it travels and notes what that rounds off."""
        kernels.pack_dense(self.wire, self.work[begin:end], out, self._error(begin, end))

    def add(self, begin: int, end: int, data: torch.Tensor) -> None:
        """Adds what arrived to a part."""
        kernels.unpack_dense(self.wire, data, self.work[begin:end], add=True)

    def read(self, begin: int, end: int, data: torch.Tensor) -> None:
        """Replaces a part by what arrived."""
        kernels.unpack_dense(self.wire, data, self.work[begin:end])

    def finish(self, begin: int, end: int, out: torch.Tensor | None = None) -> None:
        """Scales a finished sum that this rank owns; with `out`, packs it and rounds `work` like all other ranks'."""
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
        """Scales a finished sum of which nothing was rounded."""
        self.finish(0, self.work.numel())
        if self.error is not None:
            self.error.zero_()

    def _error(self, begin: int, end: int) -> torch.Tensor | None:
        return None if self.error is None else self.error[begin:end]
