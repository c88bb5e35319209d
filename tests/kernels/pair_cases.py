"""Whole bodies on a device and on the reference; their bytes, pairs and errors must be the same.

Used for Triton in its interpreter (tests/kernels/test_triton_pairs.py) and on a GPU (tests/gpu).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import Put, agree, octets, positions
from vectors import vector

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import IndexCodec, ValueCodec

HEAD = 88


@dataclass
class Said:
    """Description of a payload."""

    rank: int
    index_codec: IndexCodec
    value_codec: ValueCodec
    nnz: int
    numel: int
    index_bytes: int = 0
    value_scale: float = 1.0
    bucket: int = 7
    body_bytes: int = 0
    body_crc: int = 0


Made = tuple[Said, torch.Tensor]


def pairs(nnz: int, numel: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns about nnz positions, and finite values of a kind that the seed chooses."""
    everything = torch.arange(numel, dtype=torch.int64).to(torch.uint32)
    indices = everything if nnz == numel else positions(numel, nnz, seed, clustered=seed % 3 == 0)
    kind = ("normal", "wide", "zeros", "denormal")[seed % 4]
    return indices, torch.nan_to_num(vector(kind, indices.numel(), seed))


def payload(rank: int, index_codec: IndexCodec, value_codec: ValueCodec, nnz: int, numel: int) -> Made:
    """Returns a payload as a rank would send it; with all positions for the DENSE codec."""
    indices, values = pairs(numel if index_codec == IndexCodec.DENSE else nnz, numel, 10 * rank + int(index_codec))
    said = Said(rank, index_codec, value_codec, values.numel(), numel)
    most = kernels.max_index_bytes(index_codec, said.nnz, numel) + kernels.max_value_bytes(value_codec, said.nnz)
    out = torch.zeros(HEAD + most, dtype=torch.uint8)
    said.index_bytes, value_bytes, said.value_scale, said.body_crc = kernels.encode_pairs(
        said, indices, values, out, head=HEAD
    )
    said.body_bytes = said.index_bytes + value_bytes
    return said, out[HEAD : HEAD + said.body_bytes].clone()


def together(made: Sequence[Made]) -> list[torch.Tensor]:
    """Returns bodies as they arrive: the second, which is this rank's, alone; the others one after the other."""
    own = min(1, len(made) - 1)
    others = torch.cat([torch.empty(0, dtype=torch.uint8), *(body for i, (_, body) in enumerate(made) if i != own)])
    bodies, at = [], 0
    for i, (_, body) in enumerate(made):
        bodies.append(body if i == own else others[at : at + body.numel()])
        at += 0 if i == own else body.numel()
    return bodies


def check_encode(device: str, codecs: tuple[IndexCodec, ValueCodec], nnz: int, numel: int, seed: int) -> None:
    """Checks the bytes, and the rounding errors, which replace the values for every second seed."""
    index_codec, value_codec = codecs
    indices, values = pairs(numel if index_codec == IndexCodec.DENSE else nnz, numel, seed)
    most = kernels.max_index_bytes(index_codec, values.numel(), numel) + kernels.max_value_bytes(
        value_codec, values.numel()
    )

    def call(put: Put) -> tuple[Any, ...]:
        out = torch.zeros(HEAD + most, dtype=torch.uint8, pin_memory=device == "cuda")
        mine = put(values)
        error = mine if seed % 2 else put(torch.zeros(values.numel(), dtype=torch.float32))
        form = Said(0, index_codec, value_codec, values.numel(), numel)
        sizes = kernels.encode_pairs(form, put(indices), mine, out, error, head=HEAD)
        return *sizes, out[HEAD : HEAD + sizes[0] + sizes[1]], error

    agree(device, call, offset=seed % 4)


def check_decode(
    device: str, said: Sequence[Said], bodies: Sequence[torch.Tensor], *, verify: bool = False
) -> tuple[Any, ...]:
    """Checks pairs or error, and that only the outputs are written; returns the results of the reference."""
    total, edge = sum(s.nnz for s in said), 16

    def call(put: Put) -> tuple[Any, ...]:
        indices = put(torch.full((total + 2 * edge,), 7, dtype=torch.int64).to(torch.uint32))
        values = put(torch.full((total + 2 * edge,), 7.0, dtype=torch.float32))
        room = indices[edge : total + edge], values[edge : total + edge]
        failed: tuple[Any, ...] = ()
        parts = []
        try:
            parts = kernels.decode_pairs(said, bodies, *room, verify=verify)
        except WireError as error:
            failed = error.rank, error.bucket, error.field, str(error.value), error.reason
        outside = [octets(t[cut]) for t in (indices, values) for cut in (slice(edge), slice(total + edge, None))]
        return *(failed or room), *(t for part in parts for t in part), *outside

    return agree(device, call)


def check_decoded(device: str, made: Sequence[Made]) -> None:
    """Checks that undamaged payloads are decoded."""
    truth = check_decode(device, [said for said, _ in made], together(made))
    assert isinstance(truth[0], torch.Tensor), truth[:5]


def damaged(made: Made, way: int, seed: int) -> Made:
    """Returns a payload with one change, which usually makes it invalid."""
    said, body = made[0], made[1].clone()
    rng = np.random.default_rng(seed)
    if way == 0 and body.numel():
        body[rng.integers(0, body.numel())] ^= 1 << int(rng.integers(0, 8))
    elif way == 1:
        body = body[: int(rng.integers(0, body.numel() + 1))]
    elif way == 2:
        body = torch.from_numpy(rng.integers(0, 256, body.numel(), dtype=np.uint8))
    elif way == 3:
        said.index_bytes = int(rng.integers(0, body.numel() + 5))
    elif way == 4:
        said.value_scale = float(rng.choice([0.0, -1.0, np.inf, 1e300, 2.0]))
    else:
        said.numel = int(rng.integers(said.nnz, said.numel + 1))
    return said, body
