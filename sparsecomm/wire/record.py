"""Fixed records: little-endian structs, each of which ends with the CRC32C of its other bytes.

Every fixed part of a message is a record, e.g. the header of a payload or a part, a digest or an envelope.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch

from sparsecomm import kernels
from sparsecomm.errors import WireError

__all__ = ["Record"]

_CRC_BYTES = 4


class Record:
    """The layout of a fixed record.

    Args:
        noun: name of the record in errors, e.g. "header".
        fields: name and `struct` format of every field, in order. Fields named "reserved" hold zeros and must be
            consecutive.
        magic: first bytes of the record, followed by a byte with the version; empty for neither.
        version: version of the format.
        crc: name of the checksum in errors.

    Attributes:
        nbytes: length of the record in bytes.
    """

    def __init__(
        self, noun: str, fields: Sequence[tuple[str, str]], *, magic: bytes = b"", version: int = 0, crc: str
    ) -> None:
        head = f"{len(magic)}sB" if magic else ""
        self._struct = struct.Struct("<" + head + "".join(code for _, code in fields) + "I")
        self.nbytes = self._struct.size
        self._noun, self._crc, self._magic, self._version = noun, crc, magic, version
        self._head: tuple[Any, ...] = (magic, version) if magic else ()
        reserved = [i for i, (name, _) in enumerate(fields) if name == "reserved"]
        # Values before the reserved fields. `_gap` to `_after` are the places of these in the unpacked tuple.
        self._before = reserved[0] if reserved else len(fields)
        self._zeros = tuple(
            bytes(int(code[:-1])) if code[-1] == "s" else 0 for name, code in fields if name == "reserved"
        )
        self._first = len(self._head)
        self._gap = self._first + self._before
        self._after = self._gap + len(self._zeros)
        self._covered = self.nbytes - _CRC_BYTES

    def write(self, out: torch.Tensor, values: tuple[Any, ...]) -> None:
        """Writes a record into the first `nbytes` of a uint8 tensor. Mutates `out`.

        Args:
            out: uint8, on the host.
            values: values of all fields except reserved ones, in order.
        """
        view: Any = out.numpy()
        before = self._before
        self._struct.pack_into(view, 0, *self._head, *values[:before], *self._zeros, *values[before:], 0)
        struct.pack_into("<I", view, self._covered, kernels.crc32c(out[: self._covered]))

    def read(self, data: torch.Tensor) -> tuple[Any, ...]:
        """Checks a record and returns the values of all fields except reserved ones.

        Args:
            data: uint8, on the host, at least `nbytes` long.

        Raises:
            WireError: there are too few bytes, the magic, version or checksum is wrong, or a reserved field is not
                zero.
        """
        if data.numel() < self.nbytes:
            article = "an" if self._noun[0] in "aeiou" else "a"
            raise WireError("length", data.numel(), f"{article} {self._noun} has {self.nbytes} bytes")
        view: Any = data.numpy()
        fields = self._struct.unpack_from(view, 0)
        if self._magic and fields[:2] != self._head:
            if fields[0] != self._magic:
                raise WireError("magic", fields[0], f"expected {self._magic!r}")
            raise WireError("version", fields[1], f"this build reads version {self._version}")
        crc = kernels.crc32c(data[: self._covered])
        if crc != fields[-1]:
            raise WireError(self._crc, hex(fields[-1]), f"the {self._noun}'s checksum is {crc:#x}")
        found = fields[self._gap : self._after]
        if found != self._zeros:
            raise WireError("reserved", found, "must be zero")
        return fields[self._first : self._gap] + fields[self._after : -1]
