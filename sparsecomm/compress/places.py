"""Places in a bucket that all ranks know: single elements, or chunks of elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Places"]


@dataclass(frozen=True, slots=True)
class Places:
    """Some elements of a flat vector. They are packed, sent without positions, and unpacked.

    Attributes:
        chunks: chunk numbers, int64, shape (m,), strictly ascending.
        width: elements per chunk; the vector's last chunk may be shorter.
        numel: elements of the vector.
    """

    chunks: torch.Tensor
    width: int
    numel: int

    @property
    def count(self) -> int:
        """Number of elements."""
        short = self.width - self._tail if self._has_tail else 0
        return self.chunks.numel() * self.width - short

    @property
    def _tail(self) -> int:
        return self.numel % self.width

    @property
    def _has_tail(self) -> bool:
        return bool(self._tail and self.chunks.numel() and int(self.chunks[-1]) == self.numel // self.width)

    def gather(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """Packs: copies these elements of `source`, shape (numel,), to `out`, shape (count,). Mutates `out`."""
        rows, chunks, parts = self._rows(source), *self._split(out)
        torch.index_select(rows, 0, chunks, out=parts[0])
        parts[1].copy_(source[self.numel - parts[1].numel() :])

    def put(self, packed: torch.Tensor, into: torch.Tensor) -> None:
        """Unpacks: copies `packed`, shape (count,), to these elements of `into`, shape (numel,). Mutates `into`."""
        rows, chunks, parts = self._rows(into), *self._split(packed.to(into.dtype))
        rows.index_copy_(0, chunks, parts[0])
        into[self.numel - parts[1].numel() :].copy_(parts[1])

    def fill(self, into: torch.Tensor, value: float) -> None:
        """Sets these elements of `into`, shape (numel,), to `value`. Mutates `into`."""
        chunks = self.chunks[:-1] if self._has_tail else self.chunks
        self._rows(into).index_fill_(0, chunks, value)
        if self._has_tail:
            into[self.numel - self._tail :].fill_(value)

    def positions(self) -> torch.Tensor:
        """Returns the positions of the elements, int64, shape (count,), ascending."""
        if self.width == 1:
            return self.chunks
        every = self.chunks[:, None] * self.width + torch.arange(self.width, dtype=torch.int64)
        return every.flatten()[: self.count]

    def _rows(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns the vector's full chunks as rows.

        Chunks of one element stay flat: torch copies single elements much faster than rows of one.
        """
        if self.width == 1:
            return vector
        whole = self.numel // self.width
        return vector[: whole * self.width].view(whole, self.width)

    def _split(self, packed: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Splits a packed vector into full chunks and the short one.

        Returns:
            Numbers of the full chunks; their values, in the shape that `_rows` returns, and the short chunk's values.
        """
        tail = self._tail if self._has_tail else 0
        chunks = self.chunks[:-1] if tail else self.chunks
        full, short = packed[: packed.numel() - tail], packed[packed.numel() - tail :]
        return chunks, (full if self.width == 1 else full.view(-1, self.width), short)
