"""What a kernel path has to provide.

The public contract, with shapes, errors and worked examples, is the docstrings of `sparsecomm.kernels`.
Arguments reach an implementation already checked, so these functions trust sizes, dtypes and layouts. They do
not trust the *content* of encoded bytes: that is for the decoders to check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sparsecomm.types import IndexCodec, SelectResult, TopKResult, ValueCodec

__all__ = ["BatchKernels", "Described", "Kernels", "Parts"]

Parts = list[tuple[torch.Tensor, torch.Tensor]]
"""Positions and values of sparse vectors."""


class Kernels(Protocol):
    """The modules `reference`, `native` and `triton_path` all have this shape."""

    def accumulate_select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        threshold: float,
        out_indices: torch.Tensor,
        out_values: torch.Tensor,
        scale: float,
    ) -> SelectResult:
        """See `kernels.accumulate_select`."""
        ...

    def exact_topk(
        self,
        grad: torch.Tensor | None,
        residual: torch.Tensor,
        k: int,
        out_indices: torch.Tensor,
        out_values: torch.Tensor,
        scale: float,
    ) -> TopKResult:
        """See `kernels.exact_topk`."""
        ...

    def cut_topk(self, indices: torch.Tensor, values: torch.Tensor, count: int, k: int, residual: torch.Tensor) -> int:
        """See `kernels.cut_topk`."""
        ...

    def encode_indices(self, codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
        """See `kernels.encode_indices`."""
        ...

    def decode_indices(
        self, codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor
    ) -> None:
        """See `kernels.decode_indices`."""
        ...

    def encode_values(
        self, codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
    ) -> tuple[int, float]:
        """See `kernels.encode_values`."""
        ...

    def decode_values(
        self, codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor
    ) -> None:
        """See `kernels.decode_values`."""
        ...

    def scatter_add(self, out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        """See `kernels.scatter_add`."""
        ...

    def scatter_reduce(
        self, out: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float
    ) -> None:
        """See `kernels.scatter_reduce`."""
        ...

    def add_dense(self, out: torch.Tensor, data: torch.Tensor) -> None:
        """See `kernels.add_dense`."""
        ...

    def pack_dense(
        self, codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
    ) -> None:
        """See `kernels.pack_dense`."""
        ...

    def unpack_dense(self, codec: ValueCodec, data: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """See `kernels.unpack_dense`."""
        ...

    def accumulate_dense(self, grad: torch.Tensor, residual: torch.Tensor, scale: float) -> int:
        """See `kernels.accumulate_dense`."""
        ...

    def accumulate_norms(
        self, grad: torch.Tensor, residual: torch.Tensor, chunk: int, norms: torch.Tensor, scale: float
    ) -> int:
        """See `kernels.accumulate_norms`."""
        ...

    def crc32c(self, data: torch.Tensor, seed: int) -> int:
        """See `kernels.crc32c`."""
        ...

    def scratch_bytes(self) -> int:
        """See `kernels.scratch_bytes`."""
        ...

    def release_scratch(self) -> None:
        """See `kernels.release_scratch`."""
        ...


class Described(Protocol):
    """What a decoder is told of a payload; the headers of `sparsecomm.wire` are such.

    Attributes:
        rank: the sender, for errors.
        bucket: which it belongs to, for errors.
        index_codec: how the positions were written.
        value_codec: how the values were written.
        nnz: number of pairs.
        numel: length of the dense vector.
        index_bytes: length of the positions in bytes; the values follow.
        value_scale: what `encode_values` returned.
    """

    rank: int
    bucket: int
    index_codec: IndexCodec
    value_codec: ValueCodec
    nnz: int
    numel: int
    index_bytes: int
    value_scale: float


class HostKernels(Kernels, Protocol):
    """What a path on the host has beside `Kernels`: a payload in one call, since calls cost more than bytes."""

    def encode_body(
        self,
        index_codec: IndexCodec,
        value_codec: ValueCodec,
        indices: torch.Tensor,
        values: torch.Tensor,
        numel: int,
        out: torch.Tensor,
        error: torch.Tensor | None,
    ) -> tuple[int, int, float, int]:
        """Writes positions and values behind them; arguments as in `kernels.encode_pairs`, the head left out."""
        ...

    def decode_body(
        self, payload: Described, body: torch.Tensor, out_indices: torch.Tensor | None, out_values: torch.Tensor
    ) -> None:
        """Reads one of the payloads of `kernels.decode_pairs`; positions that are known are passed over."""
        ...


class BatchKernels(Kernels, Protocol):
    """What a path has beside `Kernels` where every call costs a launch and every answer a wait."""

    def encode_pairs(
        self,
        index_codec: IndexCodec,
        value_codec: ValueCodec,
        indices: torch.Tensor,
        values: torch.Tensor,
        numel: int,
        out: torch.Tensor,
        error: torch.Tensor | None,
        head: int,
    ) -> tuple[int, int, float]:
        """See `kernels.encode_pairs`."""
        ...

    def decode_pairs(
        self,
        payloads: Sequence[Described],
        bodies: Sequence[torch.Tensor],
        out_indices: torch.Tensor,
        out_values: torch.Tensor,
        check: Callable[[int], None],
    ) -> Parts:
        """See `kernels.decode_pairs`."""
        ...
