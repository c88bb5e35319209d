"""Cuts a model's parameters into contiguous shards of equal size, without regard to the tensors' borders."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sparsecomm.errors import ConfigError, WireError
from sparsecomm.runtime.kinds import check_plain
from sparsecomm.runtime.names import named_plainly
from sparsecomm.types import MAX_NUMEL

__all__ = ["ModelLayout", "Piece", "ShardSpec", "shard_spans"]

_MOST_DIMENSIONS = 64  # of a tensor in torch


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in a shard.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        start: First element of the piece, in the parameter's row-major order.
        end: One past its last element.
        offset: Position of its first element in the shard.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class ModelLayout:
    """Trainable parameters in the model's order, laid out as one flat float32 vector, each in row-major order.

    Attributes:
        names: Names of the parameters.
        shapes: Shapes of the parameters.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> ModelLayout:
        """Returns the layout of a model's trainable parameters.

        Raises:
            ConfigError: If there is none, or one that is no plain tensor of float32, float16 or bfloat16 on the CPU.
        """
        named = [(n, p) for n, p in named_plainly(model) if p.requires_grad]
        for name, p in named:
            check_plain(p, f"parameter {name!r}")
            if p.dtype not in (torch.float32, torch.float16, torch.bfloat16) or p.device.type != "cpu":
                raise ConfigError(
                    f"parameter {name!r} is {p.dtype} on {p.device}: a parameter server holds float32, float16 and "
                    "bfloat16 on the CPU"
                )
        if not named:
            raise ConfigError(f"{type(model).__name__} has no trainable parameters to serve")
        return cls(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named))

    @classmethod
    def from_json(cls, content: Any, source: int) -> ModelLayout:
        """Reads the JSON that `to_json` made.

        Raises:
            WireError: If `content` is anything else, or describes more elements than this machine's memory holds. It
                names the source.
        """
        good = isinstance(content, list) and bool(content)
        good = good and all(isinstance(c, list) and len(c) == 2 and isinstance(c[0], str) for c in content)
        good = good and all(isinstance(c[1], list) and len(c[1]) <= _MOST_DIMENSIONS for c in content)
        good = good and all(type(d) is int and 0 <= d <= MAX_NUMEL for c in content for d in c[1])
        if not good or len({c[0] for c in content}) < len(content):
            raise WireError("model", str(content)[:80], "not a list of different names, and shapes", rank=source)
        numel = sum(math.prod(c[1]) for c in content)
        if not 0 < numel <= _most_elements():
            raise WireError("model", f"{numel} elements", "none, or more than this machine's memory holds", rank=source)
        return cls(tuple(c[0] for c in content), tuple(tuple(c[1]) for c in content))

    def to_json(self) -> list[Any]:
        """Returns names and shapes as a value that JSON can hold."""
        return [[n, list(s)] for n, s in zip(self.names, self.shapes, strict=True)]

    @cached_property
    def numel(self) -> int:
        """Number of elements of all parameters together."""
        return sum(math.prod(s) for s in self.shapes)

    @property
    def hash(self) -> int:
        """Hash of 64 bits that is equal for equal layouts."""
        digest = hashlib.blake2b(repr((self.names, self.shapes)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def shard(self, index: int, shards: int) -> ShardSpec:
        """Returns shard `index` of `shards`.

        Raises:
            ConfigError: If there are more shards than elements.
        """
        start, end = shard_spans(self.numel, shards)[index]
        pieces, at = [], 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            size = math.prod(shape)
            low, high = max(start, at), min(end, at + size)
            if low < high:
                pieces.append(Piece(name, shape, low - at, high - at, low - start))
            at += size
        return ShardSpec(index, shards, start, end, tuple(pieces), self.hash)

    def difference(self, other: ModelLayout) -> str:
        """Describes the first difference between this layout and another one."""
        mine, theirs = self.to_json(), other.to_json()
        for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            if a != b:
                return f"parameter {i} is {b[0]!r} {tuple(b[1])}, not {a[0]!r} {tuple(a[1])}"
        return f"{len(theirs)} parameters, not {len(mine)}"


@dataclass(frozen=True)
class ShardSpec:
    """The part of a model that a shard holds.

    Attributes:
        index: Index of the shard.
        shards: Number of shards.
        start: First element of the shard in the model's flat vector.
        end: One past its last element.
        pieces: Pieces of parameters in the shard.
        model_hash: Hash of the model's layout.
    """

    index: int
    shards: int
    start: int
    end: int
    pieces: tuple[Piece, ...]
    model_hash: int

    @property
    def numel(self) -> int:
        """Number of elements in the shard."""
        return self.end - self.start

    @cached_property
    def hash(self) -> int:
        """Hash of 64 bits over the model and the place in it. Payloads carry it as their layout hash."""
        text = repr((self.model_hash, self.index, self.shards, self.start, self.end)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _most_elements() -> int:
    """Returns how many float32 this machine's memory holds. A message may not make a server allocate more."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def shard_spans(numel: int, shards: int) -> Sequence[tuple[int, int]]:
    """Cuts `numel` elements into contiguous spans whose lengths differ by at most one.

    Returns:
        First element and one past the last, by shard.

    Raises:
        ConfigError: If there are more shards than elements, or no shards.
    """
    if shards < 1:
        raise ConfigError(f"servers = {shards!r}: at least 1")
    if shards > numel:
        raise ConfigError(
            f"{shards} servers for a model of {numel} elements: some would hold nothing; use fewer servers"
        )
    ends = [numel * (i + 1) // shards for i in range(shards)]
    return list(zip([0, *ends], ends, strict=False))
