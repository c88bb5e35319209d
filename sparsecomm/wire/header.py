"""The fixed header of every payload: 88 bytes, little-endian, with its own checksum.

The header travels ahead of the body, so that ranks notice a disagreement before they use a length from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch

from sparsecomm import kernels
from sparsecomm.errors import ConfigError, WireError
from sparsecomm.types import MAX_NUMEL, IndexCodec, ValueCodec
from sparsecomm.wire.record import Record

__all__ = [
    "FLAG_ERROR",
    "FLAG_NONFINITE",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_ERROR_BYTES",
    "VERSION",
    "Header",
    "HeaderRules",
    "check_bare",
    "check_empty",
    "check_pairs",
    "known_rules",
    "read_header",
    "register_rules",
    "rules_of",
    "write_header",
]

MAGIC = b"SPCM"
VERSION = 1
FLAG_NONFINITE = 1
"""The sender saw NaN or infinity in this bucket."""
FLAG_ERROR = 2
"""The sender failed; the body is its error message in UTF-8."""
MAX_ERROR_BYTES = 4096
_RECORD = Record(
    "header",
    (
        ("flags", "B"),
        ("collective", "B"),
        ("value_codec", "B"),
        ("index_codec", "B"),
        ("reserved", "B"),
        ("reserved", "H"),
        ("rank", "I"),
        ("world", "I"),
        ("bucket", "I"),
        ("tag", "I"),
        ("step", "Q"),
        ("layout_hash", "Q"),
        ("numel", "Q"),
        ("nnz", "Q"),
        ("index_bytes", "Q"),
        ("value_bytes", "Q"),
        ("value_scale", "f"),
        ("body_crc", "I"),
    ),
    magic=MAGIC,
    version=VERSION,
    crc="header_crc",
)
HEADER_BYTES = _RECORD.nbytes


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """Rules for the headers of one exchange method, of ranks that choose one, or of pushes or pulls.

    Attributes:
        number: number in the headers, 1 to 255; never reused.
        label: name in errors.
        check: raises WireError if fields contradict each other.
        tagged: whether the headers may carry a tag.
        must_match: further header fields that must be the same on all ranks, with the users' word for each.
        show: returns the value of such a field in the users' words, given the name of the field and the value.
    """

    number: int
    label: str
    check: Callable[[Header], None]
    tagged: bool = False
    must_match: Mapping[str, str] = field(default_factory=dict)
    show: Callable[[str, Any], str] = lambda _, value: str(value)


_RULES: dict[int, HeaderRules] = {}


def register_rules(rules: HeaderRules) -> None:
    """Registers rules, so that headers with their number can be read.

    Raises:
        ConfigError: another label has the number, or the number is not in 1 to 255.
    """
    if not 0 < rules.number < 256:
        raise ConfigError(f"{rules.label} cannot have the number {rules.number}: it must be 1 to 255")
    known = _RULES.get(rules.number, rules)
    if known.label != rules.label:
        raise ConfigError(f"{rules.label} cannot have the number {rules.number}: {known.label} has it already")
    _RULES[rules.number] = rules


def known_rules() -> list[HeaderRules]:
    """Returns all registered rules, sorted by number."""
    return sorted(_RULES.values(), key=lambda r: r.number)


def rules_of(number: int) -> HeaderRules:
    """Returns the rules of a registered number."""
    return _RULES[number]


@dataclass(slots=True)
class Header:
    """The header of a payload. Not frozen, since every exchange makes one and completes it in several steps.

    Attributes:
        flags: bit set of FLAG_NONFINITE and FLAG_ERROR.
        collective: number of the sender's exchange method, as in `HeaderRules`.
        value_codec: codec of the values.
        index_codec: codec of the indices.
        rank: rank of the sender.
        world: number of ranks, as the sender knows it.
        bucket: bucket number.
        step: training step.
        layout_hash: 64-bit hash of the names, shapes and memory orders of the bucket's parameters.
        numel: number of elements of the dense bucket.
        nnz: number of nonzeros in the body. Without a body, k (PowerSGD: the rank; dense: 0). For signs, numel, or 0 if
            all are zero.
        index_bytes: bytes of the indices in the body.
        value_bytes: bytes of the values in the body.
        value_scale: factor on decoded FP16 values and on signs; 1 otherwise.
        body_crc: CRC32C of the body.
        tag: 32 bits whose meaning depends on the exchange method; 0 for none.
    """

    flags: int
    collective: int
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
    tag: int = 0

    @property
    def body_bytes(self) -> int:
        """Bytes of the body."""
        return self.index_bytes + self.value_bytes


def write_header(header: Header, out: torch.Tensor) -> None:
    """Writes a header into the first HEADER_BYTES of a uint8 tensor. Mutates `out`."""
    h = header
    _RECORD.write(
        out,
        (
            h.flags,
            h.collective,
            h.value_codec,
            h.index_codec,
            h.rank,
            h.world,
            h.bucket,
            h.tag,
            h.step,
            h.layout_hash,
            h.numel,
            h.nnz,
            h.index_bytes,
            h.value_bytes,
            h.value_scale,
            h.body_crc,
        ),
    )


def read_header(data: torch.Tensor) -> Header:
    """Reads and checks a header. Its checksum is checked before any field is used.

    Args:
        data: uint8, at least HEADER_BYTES long.

    Raises:
        WireError: a field is wrong. The error names the first such field and its value.
    """
    flags, collective, value_codec, index_codec, rank, world, bucket, tag, *rest = _RECORD.read(data)
    step, layout_hash, numel, nnz, index_bytes, value_bytes, value_scale, body_crc = rest
    if flags & ~(FLAG_NONFINITE | FLAG_ERROR):
        raise WireError("flags", flags, "unknown bits")
    rules = _RULES.get(collective)
    if rules is None:
        known = ", ".join(f"{r.number} ({r.label})" for r in known_rules())
        raise WireError("collective", collective, f"known are {known}")
    header = Header(
        flags=flags,
        collective=collective,
        value_codec=_enum(ValueCodec, "value_codec", value_codec),
        index_codec=_enum(IndexCodec, "index_codec", index_codec),
        rank=rank,
        world=world,
        bucket=bucket,
        step=step,
        layout_hash=layout_hash,
        numel=numel,
        nnz=nnz,
        index_bytes=index_bytes,
        value_bytes=value_bytes,
        value_scale=value_scale,
        body_crc=body_crc,
        tag=tag,
    )
    _check_common(header)
    if header.flags & FLAG_ERROR:
        _check_error(header, rules)
    else:
        rules.check(header)
    return header


_E = TypeVar("_E", bound=IntEnum)


def _enum(kind: type[_E], field: str, value: int) -> _E:
    found = kind._value2member_map_.get(value)  # three times as fast as kind(value), and used for every header
    if found is None:
        known = ", ".join(f"{e.value} ({e.name})" for e in kind)
        raise WireError(field, value, f"known are {known}")
    return cast(_E, found)


# Lengths are checked against n, so that a damaged header cannot make a receiver allocate more than n allows.


def _check_common(h: Header) -> None:
    """Checks the fields that have the same meaning in every header."""
    if h.rank >= h.world:
        raise WireError("rank", h.rank, f"the sender's world has {h.world} ranks")
    if h.numel > MAX_NUMEL:
        raise WireError("numel", h.numel, f"at most {MAX_NUMEL}")
    if h.nnz > h.numel:
        raise WireError("nnz", h.nnz, f"more than numel = {h.numel}")
    if not (math.isfinite(h.value_scale) and h.value_scale > 0.0):
        raise WireError("value_scale", h.value_scale, "must be finite and positive")


def _check_error(h: Header, rules: HeaderRules) -> None:
    """Checks the header of an error message."""
    _check_scale(h)
    if not rules.tagged:
        _check_untagged(h, rules.label)
    _at_most(h, "an error message", nnz=0, index_bytes=0, value_bytes=MAX_ERROR_BYTES)


def check_pairs(h: Header) -> None:
    """Checks a header whose body consists of positions and values."""
    _check_scale(h)
    _check_untagged(h, rules_of(h.collective).label)
    if h.index_codec == IndexCodec.DENSE and h.nnz != h.numel:
        raise WireError("nnz", h.nnz, f"the dense index codec needs nnz = numel = {h.numel}")
    most = kernels.max_index_bytes(h.index_codec, h.nnz, h.numel)
    if h.index_bytes > most:
        raise WireError("index_bytes", h.index_bytes, f"{h.index_codec.name} needs at most {most}")
    values = kernels.max_value_bytes(h.value_codec, h.nnz)
    if h.value_bytes != values:
        raise WireError("value_bytes", h.value_bytes, f"{h.value_codec.name} needs {values} for nnz = {h.nnz}")


def check_bare(h: Header) -> None:
    """Checks a header without a body, in which `nnz` holds k. It may carry a tag."""
    _check_scale(h)
    _at_most(h, f"{rules_of(h.collective).label}, whose values follow later,", index_bytes=0, value_bytes=0)


def check_empty(h: Header) -> None:
    """Checks a header that only identifies the exchange of its sender."""
    _check_scale(h)
    _check_untagged(h, rules_of(h.collective).label)
    _at_most(h, "a dense exchange", nnz=0, index_bytes=0, value_bytes=0)


def _check_scale(h: Header) -> None:
    if h.value_codec != ValueCodec.FP16 and h.value_scale != 1.0:
        raise WireError("value_scale", h.value_scale, f"{h.value_codec.name} values have the scale 1")


def _check_untagged(h: Header, label: str) -> None:
    if h.tag:
        raise WireError("tag", h.tag, f"{label} has none")


def _at_most(h: Header, noun: str, **limits: int) -> None:
    for name, most in limits.items():
        if getattr(h, name) > most:
            raise WireError(name, getattr(h, name), f"{noun} has at most {most}")
