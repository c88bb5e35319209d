"""Whole bodies on a GPU: the host waits once to encode one, and once to decode those of all ranks."""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
from itertools import accumulate, chain, pairwise
from typing import NoReturn, TypeVar

import numpy as np
import torch

from sparsecomm.errors import WireError
from sparsecomm.kernels import checksum
from sparsecomm.kernels.api import BodyFormat, Described, Parts
from sparsecomm.kernels.reference import indices as reference_indices
from sparsecomm.kernels.reference import values as reference_values
from sparsecomm.kernels.sizes import estimate_index_bytes, max_index_bytes, max_value_bytes
from sparsecomm.kernels.triton.indices import STATE, refuse_unsorted, write_indices
from sparsecomm.kernels.triton.launch import read, runs, upload
from sparsecomm.kernels.triton.positions import plausible_indices, read_indices
from sparsecomm.kernels.triton.shared import COLUMNS, Batch
from sparsecomm.kernels.triton.values import half_scale, plausible_values, read_values, scale_bits, write_values
from sparsecomm.runtime.device import side_of
from sparsecomm.types import ValueCodec

__all__ = ["decode_pairs", "encode_pairs"]

_SLACK = 4096
"""Bytes fetched in addition to 17/16 of the expected bytes of the positions."""

_K = TypeVar("_K", bound=Hashable)


def encode_pairs(
    form: BodyFormat,
    indices: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    error: torch.Tensor | None,
    head: int,
) -> tuple[int, int, float]:
    """Encodes on the device; waits for it once, or twice if positions take far more bytes than expected.

    Lengths, scale and verdict are stored in front of the body, so that one copy brings everything that the host needs.
    """
    index_codec, value_codec, numel = form.index_codec, form.value_codec, form.numel
    nnz, side = values.numel(), side_of(values.device)
    value_bytes, most = max_value_bytes(value_codec, nnz), max_index_bytes(index_codec, nnz, numel)
    packed = torch.empty(head + most + value_bytes, dtype=torch.uint8, device=values.device)
    state = packed[: 8 * STATE].view(torch.int64).zero_()
    known = write_indices(index_codec, indices, numel, packed[head:], state)
    write_values(value_codec, values, packed[head + (known or 0) :], state, error)
    likely = known
    if likely is None:
        expected = estimate_index_bytes(index_codec, nnz, numel)
        likely = min(most, expected + expected // 16 + _SLACK)
    first = head + likely + value_bytes
    side.fetch(packed[:first], out[:first])
    wrong, length, largest, _ = out[: 8 * STATE].numpy().view(np.int64).tolist()
    if wrong:
        refuse_unsorted(index_codec, indices, numel)
    index_bytes = length if known is None else known
    end = head + index_bytes + value_bytes
    if end > first:
        side.fetch(packed[first:end], out[first:end])
    return index_bytes, value_bytes, half_scale(largest) if value_codec == ValueCodec.FP16 else 1.0


def decode_pairs(
    payloads: Sequence[Described],
    bodies: Sequence[torch.Tensor],
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    verify: Container[int],
) -> Parts:
    """Decodes all payloads in the same launches and verifies meanwhile; waits for the device once, for the verdicts."""
    if not all(map(_plausible, payloads, bodies)):
        _refuse(payloads, bodies, range(len(payloads)), verify)
    verdicts = _launch(payloads, bodies, out_indices, out_values)
    for i, (payload, body) in enumerate(zip(payloads, bodies, strict=True)):
        if i in verify:
            checksum.check_body(payload, body)
    bad = [i for i, verdict in enumerate(read(verdicts)) if verdict]
    if bad:
        _refuse(payloads, bodies, bad, ())
    starts = accumulate((p.nnz for p in payloads), initial=0)
    return [(out_indices[a:b], out_values[a:b]) for a, b in pairwise(starts)]


def _split(payload: Described, body: torch.Tensor) -> tuple[int, int]:
    """Returns the bytes of positions and of values in a body, limited to the bytes that the body really has."""
    index_bytes = min(payload.index_bytes, body.numel())
    return index_bytes, body.numel() - index_bytes


def _plausible(payload: Described, body: torch.Tensor) -> bool:
    """Returns whether lengths and scale allow kernels to read the bytes."""
    (index_bytes, value_bytes), nnz = _split(payload, body), payload.nnz
    return plausible_indices(payload.index_codec, index_bytes, nnz, payload.numel) and plausible_values(
        payload.value_codec, value_bytes, nnz, payload.value_scale
    )


def _refuse(
    payloads: Sequence[Described], bodies: Sequence[torch.Tensor], members: Sequence[int], verify: Container[int]
) -> NoReturn:
    """Raises the reference's error for the first of the payloads `members` that a loop over them would refuse."""
    for i in members:
        payload, host = payloads[i], bodies[i].cpu()
        if i in verify:
            checksum.check_body(payload, host)
        nnz, split = payload.nnz, payload.index_bytes
        room = torch.empty(nnz, dtype=torch.uint32), torch.empty(nnz, dtype=torch.float32)
        try:
            reference_indices.decode_indices(payload.index_codec, host[:split], nnz, payload.numel, room[0])
            reference_values.decode_values(payload.value_codec, host[split:], nnz, payload.value_scale, room[1])
        except WireError as error:
            raise error.at(rank=payload.rank, bucket=payload.bucket) from None
    first, reason = payloads[members[0]], "the device and the reference disagree about these bytes"
    raise WireError("body", first.nnz, reason, rank=first.rank, bucket=first.bucket)


def _launch(
    payloads: Sequence[Described], bodies: Sequence[torch.Tensor], out_indices: torch.Tensor, out_values: torch.Tensor
) -> torch.Tensor:
    """Decodes plausible payloads, one set of launches for each codec; returns the verdicts, on the device."""
    data, bases = _gathered(bodies, out_values.device)
    starts = [0, *accumulate(p.nnz for p in payloads)]
    sizes = [_split(payload, body) for payload, body in zip(payloads, bodies, strict=True)]
    by_index = _grouped([p.index_codec if p.nnz or size[0] else None for p, size in zip(payloads, sizes, strict=True)])
    by_value = _grouped([p.value_codec if p.nnz else None for p in payloads])
    rows: list[int] = []
    for i in chain.from_iterable(by_index.values()):
        rows += bases[i], sizes[i][0], payloads[i].nnz, payloads[i].numel, starts[i], i
    for i in chain.from_iterable(by_value.values()):
        scale = scale_bits(payloads[i].value_scale)
        rows += bases[i] + sizes[i][0], sizes[i][1], payloads[i].nnz, scale, starts[i], i
    table = upload([*rows, *[0] * len(payloads)], data.device)
    verdicts, at = table[len(rows) :], 0
    out = out_indices.view(torch.int32)[: starts[-1]]
    for index_codec, members in by_index.items():
        shapes = [(sizes[i][0], payloads[i].nnz) for i in members]
        read_indices(index_codec, Batch(data, table[at:], verdicts), shapes, out)
        at += COLUMNS * len(members)
    for value_codec, members in by_value.items():
        batch = Batch(data, table[at:], verdicts)
        read_values(value_codec, batch, [payloads[i].nnz for i in members], out_values)
        at += COLUMNS * len(members)
    return verdicts


def _grouped(keys: Sequence[_K | None]) -> dict[_K, list[int]]:
    """Returns the numbers of the elements that have each key, without those of None."""
    found: dict[_K, list[int]] = {}
    for i, key in enumerate(keys):
        if key is not None:
            found.setdefault(key, []).append(i)
    return found


def _gathered(bodies: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Returns all bodies in one tensor on the device, and each one's offset; neighbours are copied together."""
    order = sorted((i for i, body in enumerate(bodies) if body.numel()), key=lambda i: bodies[i].data_ptr())
    data = torch.empty(sum(body.numel() for body in bodies), dtype=torch.uint8, device=device)
    bases, at = [0] * len(bodies), 0
    for i in order:
        bases[i] = at
        at += bodies[i].numel()
    at = 0
    for run in runs([bodies[i] for i in order]):
        data[at : at + run.numel()].copy_(run, non_blocking=True)
        at += run.numel()
    return data, bases
