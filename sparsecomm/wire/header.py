"""The fixed header of every payload: 88 bytes, little-endian, with a checksum of its own.

It travels ahead of the body, so that ranks find out that they disagree before they trust any length in it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import MAX_NUMEL, IndexCodec, ValueCodec

__all__ = [
    "FLAG_ERROR",
    "FLAG_NONFINITE",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_ERROR_BYTES",
    "SPAN_BYTES",
    "VERSION",
    "CollectiveKind",
    "Header",
    "read_header",
    "write_header",
]

MAGIC = b"SPCM"
VERSION = 1
FLAG_NONFINITE = 1
"""The sender saw NaN or infinity in this bucket."""
FLAG_ERROR = 2
"""The sender failed; the body is its error message in UTF-8."""
MAX_ERROR_BYTES = 4096
SPAN_BYTES = 8
"""First and last element of a span that no signs are sent of."""

_FORMAT = struct.Struct("<4sBBBBBBHIIIIQQQQQQfII")
HEADER_BYTES = _FORMAT.size
_HEADER_CRC_OFFSET = HEADER_BYTES - 4


class CollectiveKind(IntEnum):
    """What a payload belongs to: a collective, or a worker's push to or pull from a parameter server."""

    ALLGATHER = 1
    DENSE = 2
    SPLIT_REDUCE = 3
    SSAR = 4
    CHUNKED = 5
    SHARED_INDEX = 6
    TREE = 7
    POWERSGD = 8
    SIGN = 9
    TWO_LEVEL = 10
    CHOOSING = 11  # no exchange of a bucket: ranks choose one
    PUSH = 12  # of a parameter server, as PULL
    PULL = 13


_BARE = (
    CollectiveKind.SPLIT_REDUCE,
    CollectiveKind.SSAR,
    CollectiveKind.CHUNKED,
    CollectiveKind.SHARED_INDEX,
    CollectiveKind.TREE,
    CollectiveKind.POWERSGD,
    CollectiveKind.TWO_LEVEL,
)
"""Collectives whose headers have no body, but k and a plan."""


@dataclass(slots=True)
class Header:
    """What a payload says of itself. Not frozen, since one is made for every exchange and completed as it goes.

    Attributes:
        flags: bit set of FLAG_NONFINITE and FLAG_ERROR.
        collective: the collective that the sender runs.
        value_codec: how the values are written.
        index_codec: how the indices are written.
        rank: sender.
        world: number of ranks the sender believes in.
        bucket: bucket number.
        step: training step.
        layout_hash: 64-bit hash of the bucket's parameter names and shapes.
        numel: elements in the dense bucket.
        nnz: nonzeros in the body; where there is none, k. Of signs, 0 if all is zero, else numel.
        index_bytes: length of the index part of the body.
        value_bytes: length of the value part of the body.
        value_scale: factor on decoded FP16 values and on signs; 1 otherwise.
        body_crc: CRC32C of the body.
        plan: how the sender is going to proceed. In a split-reduce, tag of its regions, 0 if it has none; chunked, the
            elements of a chunk; with shared indices, 1 + the seed of their sample, 0 if a rank leads; in PowerSGD, tag
            of the factors that it starts from, 0 if it has none; on two levels, tag of the nodes.
    """

    flags: int
    collective: CollectiveKind
    value_codec: ValueCodec
    index_codec: IndexCodec
    rank: int
    world: int
    bucket: int
    step: int
    layout_hash: int
    numel: int
    nnz: int
    index_bytes: int
    value_bytes: int
    value_scale: float = 1.0
    body_crc: int = 0
    plan: int = 0

    @property
    def body_bytes(self) -> int:
        """Length of the body that follows."""
        return self.index_bytes + self.value_bytes


def write_header(header: Header, out: torch.Tensor) -> None:
    """Writes a header into the first HEADER_BYTES of a uint8 tensor."""
    h = header
    view: Any = out.numpy()
    _FORMAT.pack_into(
        view,
        0,
        MAGIC,
        VERSION,
        h.flags,
        h.collective,
        h.value_codec,
        h.index_codec,
        0,
        0,
        h.rank,
        h.world,
        h.bucket,
        h.plan,
        h.step,
        h.layout_hash,
        h.numel,
        h.nnz,
        h.index_bytes,
        h.value_bytes,
        h.value_scale,
        h.body_crc,
        0,
    )
    crc = kernels.crc32c(out[:_HEADER_CRC_OFFSET])
    struct.pack_into("<I", view, _HEADER_CRC_OFFSET, crc)


def read_header(data: torch.Tensor) -> Header:
    """Reads and checks a header; nothing in it is trusted before its checksum fits.

    Args:
        data: uint8, at least HEADER_BYTES long.

    Raises:
        WireError: names the first field that is wrong and its value.
    """
    if data.numel() < HEADER_BYTES:
        raise WireError("length", data.numel(), f"a header has {HEADER_BYTES} bytes")
    view: Any = data.numpy()
    fields = _FORMAT.unpack_from(view, 0)
    magic, version, flags, collective, value_codec, index_codec, pad0, pad1 = fields[:8]
    rank, world, bucket, plan = fields[8:12]
    if magic != MAGIC:
        raise WireError("magic", magic, f"expected {MAGIC!r}")
    if version != VERSION:
        raise WireError("version", version, f"this build reads version {VERSION}")
    crc = kernels.crc32c(data[:_HEADER_CRC_OFFSET])
    if crc != fields[20]:
        raise WireError("header_crc", hex(fields[20]), f"the header's checksum is {crc:#x}")
    if pad0 or pad1:
        raise WireError("reserved", (pad0, pad1), "must be zero")
    if flags & ~(FLAG_NONFINITE | FLAG_ERROR):
        raise WireError("flags", flags, "unknown bits")
    header = Header(
        flags=flags,
        collective=_enum(CollectiveKind, "collective", collective),
        value_codec=_enum(ValueCodec, "value_codec", value_codec),
        index_codec=_enum(IndexCodec, "index_codec", index_codec),
        rank=rank,
        world=world,
        bucket=bucket,
        step=fields[12],
        layout_hash=fields[13],
        numel=fields[14],
        nnz=fields[15],
        index_bytes=fields[16],
        value_bytes=fields[17],
        value_scale=fields[18],
        body_crc=fields[19],
        plan=plan,
    )
    _check_sizes(header)
    return header


_E = TypeVar("_E", bound=IntEnum)


def _enum(kind: type[_E], field: str, value: int) -> _E:
    found = kind._value2member_map_.get(value)  # a third of the time of kind(value), three times a header
    if found is None:
        known = ", ".join(f"{e.value} ({e.name})" for e in kind)
        raise WireError(field, value, f"known are {known}")
    return cast(_E, found)


def _check_sizes(h: Header) -> None:
    """Checks lengths against each other, so that a receiver allocates no more than n allows."""
    if h.rank >= h.world:
        raise WireError("rank", h.rank, f"the sender's world has {h.world} ranks")
    if h.numel > MAX_NUMEL:
        raise WireError("numel", h.numel, f"at most {MAX_NUMEL}")
    if h.nnz > h.numel:
        raise WireError("nnz", h.nnz, f"more than numel = {h.numel}")
    if not (math.isfinite(h.value_scale) and h.value_scale > 0.0):
        raise WireError("value_scale", h.value_scale, "must be finite and positive")
    signs = h.collective == CollectiveKind.SIGN and not h.flags & FLAG_ERROR
    if h.value_codec != ValueCodec.FP16 and h.value_scale != 1.0 and not signs:
        raise WireError("value_scale", h.value_scale, f"{h.value_codec.name} values have the scale 1")
    if h.plan and h.collective not in _BARE:
        raise WireError("plan", h.plan, f"{h.collective.name} has none")
    if h.flags & FLAG_ERROR:
        _at_most(h, "an error message", nnz=0, index_bytes=0, value_bytes=MAX_ERROR_BYTES)
        return
    if h.collective == CollectiveKind.DENSE:
        _at_most(h, "a dense exchange", nnz=0, index_bytes=0, value_bytes=0)
        return
    if h.collective in _BARE:
        _at_most(h, f"{h.collective.name}, whose values follow later,", index_bytes=0, value_bytes=0)
        return
    if signs:
        _check_signs(h)
        return
    if h.index_codec == IndexCodec.DENSE and h.nnz != h.numel:
        raise WireError("nnz", h.nnz, f"the dense index codec needs nnz = numel = {h.numel}")
    most = kernels.max_index_bytes(h.index_codec, h.nnz, h.numel)
    if h.index_bytes > most:
        raise WireError("index_bytes", h.index_bytes, f"{h.index_codec.name} needs at most {most}")
    values = kernels.max_value_bytes(h.value_codec, h.nnz)
    if h.value_bytes != values:
        raise WireError("value_bytes", h.value_bytes, f"{h.value_codec.name} needs {values} for nnz = {h.nnz}")


def _check_signs(h: Header) -> None:
    """A body of signs is there whole or not at all; its index bytes are spans that are not sent."""
    if h.nnz not in (0, h.numel):
        raise WireError("nnz", h.nnz, f"signs are of all {h.numel} elements or of none")
    if h.value_bytes != -(-h.nnz // 8):
        raise WireError("value_bytes", h.value_bytes, f"{h.nnz} signs need {-(-h.nnz // 8)}")
    if h.index_bytes % SPAN_BYTES or h.index_bytes > SPAN_BYTES * -(-h.nnz // 2):
        raise WireError("index_bytes", h.index_bytes, f"not spans of {SPAN_BYTES} bytes among {h.nnz} elements")
    if (h.value_codec, h.index_codec) != (ValueCodec.FP32, IndexCodec.RAW):
        raise WireError("value_codec", h.value_codec, "signs are written in one way, which is called fp32 and raw")


def _at_most(h: Header, what: str, **limits: int) -> None:
    for field, most in limits.items():
        if getattr(h, field) > most:
            raise WireError(field, getattr(h, field), f"{what} has at most {most}")
