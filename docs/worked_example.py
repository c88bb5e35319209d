"""Prints the worked payload and part of docs/wire-format.md: `python docs/worked_example.py`."""

from __future__ import annotations

import torch

from sparsecomm.types import Codecs, IndexCodec, ValueCodec
from sparsecomm.wire.header import HEADER_BYTES, Header
from sparsecomm.wire.pairs import encode_payload, max_payload_bytes
from sparsecomm.wire.part import encode_part, max_part_bytes

__all__ = ["worked_example", "worked_part"]


def worked_example() -> str:
    """Returns the example payload as lines of hexadecimal bytes, 16 a line, each with its offset."""
    blank = Header(
        flags=0,
        collective=1,  # allgather
        value_codec=ValueCodec.FP16,
        index_codec=IndexCodec.RICE,
        rank=1,
        world=2,
        bucket=3,
        step=7,
        layout_hash=0x0123456789ABCDEF,
        numel=10,
        nnz=0,
        index_bytes=0,
        value_bytes=0,
    )
    indices = torch.tensor([2, 9]).to(torch.uint32)
    values = torch.tensor([1.5, -0.25])
    out = torch.zeros(max_payload_bytes(blank.index_codec, blank.value_codec, 2, 10), dtype=torch.uint8)
    encode_payload(blank, indices, values, out, torch.empty(2))
    return _dump(out[: HEADER_BYTES + blank.body_bytes])


def worked_part() -> str:
    """Returns the same two values as a part of a region that starts at position 2 and has 8 elements."""
    indices, values = torch.tensor([0, 7]).to(torch.uint32), torch.tensor([1.5, -0.25])
    codecs = Codecs(ValueCodec.FP16, IndexCodec.RICE)
    out = torch.zeros(max_part_bytes(2, 8, codecs), dtype=torch.uint8)
    return _dump(out[: encode_part(indices, values, 8, codecs, out, torch.empty(2))])


def _dump(payload: torch.Tensor) -> str:
    data = bytes(payload.numpy())
    return "\n".join(f"{i:3d}  {data[i : i + 16].hex(' ')}" for i in range(0, len(data), 16))


if __name__ == "__main__":
    print(worked_example(), worked_part(), sep="\n\n")
