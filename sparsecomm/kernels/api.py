"""The interface of a kernel path.

The docstrings of `sparsecomm.kernels` are the full contract, with shapes, errors and worked examples. An implementation
receives arguments that have been checked, so it trusts sizes, dtypes and layouts. It does not trust the *content* of
encoded bytes: its decoders check that.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

import torch

from sparsecomm.types import IndexCodec, SelectResult, TopKResult, ValueCodec

__all__ = ["BatchKernels", "BodyFormat", "Described", "HostKernels", "Kernels", "Parts"]

Parts = list[tuple[torch.Tensor, torch.Tensor]]
"""Positions and values of sparse vectors."""


class BodyFormat(Protocol):
    """How the body of a payload is written. The headers of `sparsecomm.wire` have this shape.

    Attributes:
        index_codec: codec of the positions.
        value_codec: codec of the values.
        numel: length of the dense vector, at most 2**32.
    """

    index_codec: IndexCodec
    value_codec: ValueCodec
    numel: int


class Described(BodyFormat, Protocol):
    """Description of a payload that a decoder needs. The headers of `sparsecomm.wire` have this shape.

    Attributes:
        rank: sender, named in errors.
        bucket: bucket of the payload, named in errors.
        nnz: number of pairs.
        index_bytes: length of the positions in bytes; the values follow them.
        value_scale: scale that `encode_values` returned.
        body_crc: CRC32C of the body.
    """

    rank: int
    bucket: int
    nnz: int
    index_bytes: int
    value_scale: float
    body_crc: int

    @property
    def body_bytes(self) -> int:
        """Length of the body in bytes."""
        ...


class Kernels(Protocol):
    """Functions of every path; the modules `reference`, `native` and `triton.path` have this shape."""

    def accumulate_select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        threshold: float,
        out_indices: torch.Tensor,
        out_values: torch.Tensor,
        scale: float,
    ) -> SelectResult:
        """Adds the scaled gradient to the residual and takes out the elements that reach the threshold."""
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
        """Adds the scaled gradient, if any, to the residual and takes out the k largest magnitudes."""
        ...

    def cut_topk(self, indices: torch.Tensor, values: torch.Tensor, count: int, k: int, residual: torch.Tensor) -> int:
        """Keeps the k largest of `count` pairs, puts the others back into the residual, returns how many are kept."""
        ...

    def encode_indices(self, codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
        """Writes ascending positions as bytes and returns the number of bytes."""
        ...

    def decode_indices(
        self, codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor
    ) -> None:
        """Reads nnz positions below numel, or raises WireError."""
        ...

    def encode_values(
        self, codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
    ) -> tuple[int, float]:
        """Writes finite values as bytes, rounding errors to `error`, and returns the number of bytes and the scale."""
        ...

    def decode_values(
        self, codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor
    ) -> None:
        """Reads nnz finite values, or raises WireError."""
        ...

    def scatter_add(self, out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Adds sparse values into a dense vector."""
        ...

    def scatter_reduce(
        self, out: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float
    ) -> None:
        """Sets a dense vector to the scaled sum of sparse ones, added in their order."""
        ...

    def add_dense(self, out: torch.Tensor, data: torch.Tensor) -> None:
        """Adds a dense float32 vector, or its bytes, into another."""
        ...

    def pack_dense(
        self, codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
    ) -> None:
        """Writes a segment of a dense vector as bytes; NaN and infinity are kept."""
        ...

    def unpack_dense(self, codec: ValueCodec, data: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """Reads a segment of a dense vector into `out`, or adds it there."""
        ...

    def accumulate_dense(self, grad: torch.Tensor, residual: torch.Tensor, scale: float) -> int:
        """Adds the scaled gradient to the residual where the sum is finite; returns how many sums are not."""
        ...

    def accumulate_norms(
        self, grad: torch.Tensor, residual: torch.Tensor, chunk: int, norms: torch.Tensor, scale: float
    ) -> int:
        """Accumulates as `accumulate_dense` does, and writes the L1 norm of every chunk of the residual."""
        ...

    def crc32c(self, data: torch.Tensor, seed: int) -> int:
        """Returns the CRC32C of bytes that follow others whose CRC32C is `seed`."""
        ...

    def scratch_bytes(self) -> int:
        """Returns the bytes of work space held over all threads."""
        ...

    def release_scratch(self) -> None:
        """Frees the work space of the calling thread."""
        ...


class HostKernels(Kernels, Protocol):
    """Further functions of a path on the host: a body in one call, because a call costs more than a small body."""

    def encode_body(
        self,
        form: BodyFormat,
        indices: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        error: torch.Tensor | None,
    ) -> tuple[int, int, float, int]:
        """Writes positions and values; returns bytes of the positions, bytes of the values, scale and CRC32C."""
        ...

    def decode_body(
        self, payload: Described, body: torch.Tensor, out_indices: torch.Tensor | None, out_values: torch.Tensor
    ) -> None:
        """Reads a body, or raises WireError; with None for `out_indices` the positions are skipped, unread."""
        ...


class BatchKernels(Kernels, Protocol):
    """Further functions of a path on a device, where every call costs a launch and every answer a wait."""

    def encode_pairs(
        self,
        form: BodyFormat,
        indices: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        error: torch.Tensor | None,
        head: int,
    ) -> tuple[int, int, float]:
        """Writes a body to the host behind `head` bytes; returns bytes of positions, bytes of values and scale."""
        ...

    def decode_pairs(
        self,
        payloads: Sequence[Described],
        bodies: Sequence[torch.Tensor],
        out_indices: torch.Tensor,
        out_values: torch.Tensor,
        verify: Container[int],
    ) -> Parts:
        """Reads all bodies; the host checks length and CRC32C of those that `verify` numbers while the device works."""
        ...
