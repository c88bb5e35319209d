"""The file of one shard at one version: who wrote it, its place in the model, its tensors, and checksums of all bytes.

| part | content |
|---|---|
| head | a `Record`: lengths of the other parts, and two checksums, one of the facts and one of the rest |
| facts | JSON: `Facts` |
| table | JSON: dtype, shape and place of each tensor, and the numbers and texts in the optimizer's state |
| data | the tensors, little-endian, each at a multiple of 16 bytes |

It holds no pickle, so reading it runs no code. Nothing in it is used before its checksum has been compared.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sparsecomm import kernels
from sparsecomm.errors import StateError, WireError
from sparsecomm.ps.server.saved import Facts, SavedVersion, is_count
from sparsecomm.runtime.kinds import tensor_problem
from sparsecomm.wire import Record

__all__ = ["Content", "State", "load", "read_facts", "write"]

_HEAD = Record(
    "head",
    (("facts_bytes", "I"), ("table_bytes", "Q"), ("data_bytes", "Q"), ("facts_crc", "I"), ("body_crc", "I")),
    magic=b"SPCK",
    version=1,
    crc="head_crc",
)
_ZIP = b"PK\x03\x04"
_ALIGN = 16
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}

State = dict[str, Any]
"""The optimizer's state of one piece: tensors, numbers, texts and None, by name."""


@dataclass(frozen=True)
class Content:
    """A file's whole content.

    Attributes:
        facts: Which shard of which version it is.
        values: The parameters, float32, shape (end - start,).
        states: State of the optimizer, by piece.
    """

    facts: Facts
    values: torch.Tensor
    states: list[State]


# --- writing ---


def write(file: BinaryIO, content: Content) -> None:
    """Writes a file's content.

    Args:
        file: Opened for writing, empty.
        content: The content.

    Raises:
        StateError: If the optimizer's state holds anything but numbers, texts, None and plain tensors on the CPU.
        OSError: If the file cannot be written.
    """
    tensors = _Tensors()
    table = {
        "values": tensors.add("values", content.values),
        "states": [tensors.pack(state) for state in content.states],
    }
    facts_json = _json(asdict(content.facts))
    table_json = _json(table)
    table_json += b" " * (-len(table_json) % _ALIGN)
    body_crc = kernels.crc32c(table_json)
    for part in tensors.parts:
        body_crc = kernels.crc32c(part, body_crc)
    head = torch.empty(_HEAD.nbytes, dtype=torch.uint8)
    lengths = len(facts_json), len(table_json), sum(part.numel() for part in tensors.parts)
    _HEAD.write(head, (*lengths, kernels.crc32c(facts_json), body_crc))
    for text in (bytes(head.numpy()), facts_json, table_json):
        file.write(text)
    for part in tensors.parts:
        file.write(part.numpy().data)


def _json(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


class _Tensors:
    """The tensors of a file in the order of its data.

    Attributes:
        parts: Their bytes and the gaps between them, uint8.
    """

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self._at = 0

    def pack(self, state: State) -> State:
        """Returns the table's entries of a piece's state.

        Raises:
            StateError: If a file cannot hold it.
        """
        for name, value in state.items():
            held = isinstance(value, torch.Tensor) or type(value) in (int, float, bool, str, type(None))
            if not isinstance(name, str) or not held:
                raise StateError(
                    f"the optimizer's state has {name!r}, a {type(value).__name__}: checkpoints hold numbers, texts "
                    "and tensors, by name"
                )
        return {k: self.add(k, v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    def add(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        """Adds a tensor and returns its entry in the table."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor_problem(tensor) is not None or tensor.device.type != "cpu" or dtype not in _DTYPES:
            raise StateError(
                f"the optimizer's state has {name!r}, a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}: "
                f"checkpoints hold plain tensors on the CPU of {', '.join(_DTYPES)}"
            )
        entry = {"dtype": dtype, "shape": list(tensor.shape), "at": self._at}
        data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        gap = torch.zeros(-data.numel() % _ALIGN, dtype=torch.uint8)
        self.parts += [data, gap]
        self._at += data.numel() + gap.numel()
        return entry


# --- reading ---


def read_facts(path: Path) -> Facts:
    """Reads and checks a file's head and facts alone.

    Raises:
        StateError: If there is no such file, or these are damaged. It names the file.
    """
    with _opened(path) as (_, head):
        return head.facts


def load(path: Path) -> Content:
    """Reads and checks a whole file.

    Raises:
        StateError: If it is not whole or not a shard's file. It names the file.
    """
    with _opened(path) as (file, head):
        body = torch.empty(head.body_bytes, dtype=torch.uint8)
        _fill(file, body)
        crc = kernels.crc32c(body)
        if crc != head.body_crc:
            raise StateError(f"its checksum is {crc:#010x}, it should be {head.body_crc:#010x}")
        table = _parsed(body[: head.table_bytes])
        data = body[head.table_bytes :]
        if not isinstance(table, dict) or set(table) != {"values", "states"} or not isinstance(table["states"], list):
            raise StateError(f"its table is {str(table)[:80]}")
        values = _tensor(table["values"], data)
        numel = head.facts.end - head.facts.start
        if values.dtype != torch.float32 or values.shape != (numel,):
            raise StateError(f"it has {tuple(values.shape)} values of {values.dtype}, not {numel} of torch.float32")
        return Content(head.facts, values, [_state(entry, data) for entry in table["states"]])


@dataclass(frozen=True)
class _Head:
    """A file's head and facts, both checked."""

    facts: Facts
    table_bytes: int
    body_bytes: int
    body_crc: int


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, _Head]]:
    """Opens a file, and reads its head and facts. Any error becomes a StateError that names the file."""
    try:
        # A pipe of that name must not make the server wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            yield file, _read_head(file)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from error
    except StateError as error:
        raise StateError(f"{path} is damaged, or no checkpoint of a shard: {error}") from error


def _read_head(file: BinaryIO) -> _Head:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise StateError("it is no regular file")
    start = torch.zeros(min(status.st_size, _HEAD.nbytes), dtype=torch.uint8)
    _fill(file, start)
    if bytes(start[: len(_ZIP)].numpy()) == _ZIP:
        raise StateError(
            "an earlier version of sparsecomm has written it, without a run's id and checksums; resume it with that "
            "version, or begin anew"
        )
    try:
        facts_bytes, table_bytes, data_bytes, facts_crc, body_crc = _HEAD.read(start)
    except WireError as error:
        raise StateError(f"{error.field} = {error.value!r}: {error.reason}") from None
    announced = _HEAD.nbytes + facts_bytes + table_bytes + data_bytes
    if announced != status.st_size or table_bytes % _ALIGN:
        raise StateError(f"it has {status.st_size} bytes, it should have {announced}")
    text = torch.empty(facts_bytes, dtype=torch.uint8)
    _fill(file, text)
    crc = kernels.crc32c(text)
    if crc != facts_crc:
        raise StateError(f"its facts' checksum is {crc:#010x}, it should be {facts_crc:#010x}")
    content = _parsed(text)
    try:
        facts = Facts(**{**content, "saved": SavedVersion.of(content["saved"])})
    except (TypeError, KeyError) as error:
        raise StateError(f"its facts are {str(content)[:80]}: {error}") from error
    return _Head(facts, table_bytes, table_bytes + data_bytes, body_crc)


def _fill(file: BinaryIO, out: torch.Tensor) -> None:
    """Reads exactly as many bytes as `out` holds."""
    got = file.readinto(out.numpy())  # type: ignore[attr-defined]
    if got != out.numel():
        raise StateError(f"it ends after {got} of {out.numel()} bytes")


def _parsed(text: torch.Tensor) -> Any:
    try:
        return json.loads(bytes(text.numpy()))
    except (ValueError, RecursionError) as error:
        raise StateError(f"not JSON: {error}") from error


def _state(entry: Any, data: torch.Tensor) -> State:
    if not isinstance(entry, dict) or any(isinstance(v, list) for v in entry.values()):
        raise StateError(f"{str(entry)[:80]} is no state of an optimizer")
    return {k: _tensor(v, data) if isinstance(v, dict) else v for k, v in entry.items()}


def _tensor(entry: Any, data: torch.Tensor) -> torch.Tensor:
    """Returns the tensor of an entry, as a view of the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "at"}:
        raise StateError(f"{str(entry)[:80]} describes no tensor")
    dtype, shape, at = entry["dtype"], entry["shape"], entry["at"]
    known = isinstance(dtype, str) and dtype in _DTYPES and isinstance(shape, list) and len(shape) <= 64
    if not known or not is_count(at) or at % _ALIGN or not all(is_count(n) for n in shape):
        raise StateError(f"{str(entry)[:80]} describes no tensor")
    end = at + math.prod(shape) * _DTYPES[dtype].itemsize
    if end > data.numel():
        raise StateError(f"{str(entry)[:80]}: there are {data.numel()} bytes")
    return _reshaped(data[at:end].view(_DTYPES[dtype]), shape)


def _reshaped(flat: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    try:
        return flat.reshape(tuple(shape))
    except RuntimeError as error:  # no elements, and a size that torch cannot hold
        raise StateError(f"no tensor has the shape {str(shape)[:80]}") from error
