"""Kernel calls on a device and on the reference; their results must be the same bits.

Used for Triton in its interpreter (tests/kernels/test_triton.py) and on a GPU (tests/gpu).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vectors import DTYPES, vector

from sparsecomm import kernels
from sparsecomm.errors import KernelError, WireError
from sparsecomm.types import IndexCodec, ValueCodec

Put = Callable[[torch.Tensor], torch.Tensor]
THRESHOLDS = (0.0, 1e-42, 0.5, 1.0, 2.5, 1e30, math.inf)
SCALES = (1.0, 0.5, 1 / 3)


def octets(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's bytes, on the host."""
    return torch.from_numpy(np.frombuffer(tensor.cpu().numpy().tobytes(), dtype=np.uint8).copy())


def placed(device: str, offset: int) -> Put:
    """Returns a function that copies tensors to a device, `offset` elements behind an aligned address."""

    def put(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
        room[offset:] = tensor.to(device)
        return room[offset:]

    return put


def agree(device: str, call: Callable[[Put], tuple[Any, ...]], *, offset: int = 0) -> tuple[Any, ...]:
    """Makes a call on the device's Triton kernels and on the reference; asserts that the results are the same bits."""
    if device == "cpu":
        kernels.set_path("triton")
    try:
        mine = call(placed(device, offset))
        kernels.set_path("reference")
        truth = call(placed("cpu", 0))
    finally:
        kernels.set_path(None)
    for got, want in zip(mine, truth, strict=True):
        if not isinstance(want, torch.Tensor):
            assert got == want
        elif want.dtype == torch.bfloat16:
            assert got.dtype == want.dtype
            assert torch.equal(got.cpu().view(torch.int16), want.view(torch.int16))
        else:
            assert got.dtype == want.dtype
            assert torch.equal(octets(got), octets(want))
    return truth


def room_for(put: Put, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return put(torch.zeros(n, dtype=torch.uint32)), put(torch.zeros(n, dtype=torch.float32))


def check_select(device: str, n: int, kind: str, seed: int) -> None:
    """Checks accumulate_select, with dtype, threshold, room, scale and alignment from the seed."""
    dtype, scale = DTYPES[seed % 3], SCALES[seed // 3 % 3]
    threshold, capacity = THRESHOLDS[seed % 7], (0, 1, 17, n, n)[seed % 5]
    grad, before = vector(kind, n, seed, dtype), vector("normal", n, seed + 1)

    def call(put: Put) -> tuple[Any, ...]:
        residual, (indices, values) = put(before), room_for(put, capacity)
        got = kernels.accumulate_select(put(grad), residual, threshold, indices, values, scale=scale)
        return got, residual, indices[: got.stored], values[: got.stored]

    agree(device, call, offset=seed % 4)


def check_topk(device: str, n: int, kind: str, seed: int, k: int) -> None:
    """Checks exact_topk, from the residual alone for every fourth seed."""
    dtype, scale, alone = DTYPES[seed % 3], SCALES[seed // 3 % 3], seed % 4 == 0
    grad, before = vector(kind, n, seed, dtype), vector(kind if alone else "normal", n, seed + 1)

    def call(put: Put) -> tuple[Any, ...]:
        residual, (indices, values) = put(before), room_for(put, k)
        given = None if alone else put(grad)
        got = kernels.exact_topk(given, residual, k, indices, values, scale=scale)
        return got, residual, indices[: got.stored], values[: got.stored]

    agree(device, call, offset=seed % 4)


def check_cut(device: str, count: int, kind: str, k: int) -> None:
    chosen, taken = (3 * torch.arange(count, dtype=torch.int64)).to(torch.uint32), vector(kind, count, k)

    def call(put: Put) -> tuple[Any, ...]:
        indices, values, residual = put(chosen), put(taken), put(torch.zeros(3 * count + 1, dtype=torch.float32))
        left = kernels.cut_topk(indices, values, count, k, residual)
        return left, indices[:left], values[:left], residual

    agree(device, call)


def check_adding(device: str, n: int, chunk: int, seed: int) -> None:
    """Checks accumulate_dense, accumulate_norms, scatter_add and add_dense."""
    grad, before = vector("nonfinite", n, seed, DTYPES[seed % 3]), vector("wide", n, seed + 1)
    some = positions(n, n // 3, seed)

    def call(put: Put) -> tuple[Any, ...]:
        one, two, norms = put(before), put(before), put(torch.zeros(-(-n // chunk), dtype=torch.float32))
        counts = (
            kernels.accumulate_dense(put(grad), one, scale=0.5),
            kernels.accumulate_norms(put(grad), two, chunk, norms, scale=0.5),
        )
        kernels.scatter_add(one, put(some), put(vector("normal", some.numel(), seed)))
        kernels.add_dense(two, put(octets(before)))
        return *counts, one, two, norms

    agree(device, call, offset=seed % 4)


def check_reduce(device: str, n: int, dtype: torch.dtype, scale: float, sizes: tuple[int, ...]) -> None:
    chosen = [positions(n, min(n, size), i) for i, size in enumerate(sizes)]
    parts = [(some, vector("wide", some.numel(), i)) for i, some in enumerate(chosen)]

    def call(put: Put) -> tuple[Any, ...]:
        out = put(torch.empty(n, dtype=dtype))
        kernels.scatter_reduce(out, [(put(i), put(v)) for i, v in parts], scale=scale)
        return (out,)

    agree(device, call)


def positions(numel: int, nnz: int, seed: int, *, clustered: bool = False) -> torch.Tensor:
    """Returns about nnz ascending positions below numel; numel - 1 is among them if nnz exceeds 4."""
    rng = np.random.default_rng(seed)
    start = int(rng.integers(0, numel - nnz + 1))
    chosen = np.arange(start, start + nnz) if clustered else rng.integers(0, numel, nnz) if nnz < numel // 2 else None
    if chosen is None:
        chosen = rng.permutation(numel)[:nnz]
    if nnz > 4:
        chosen[-1] = numel - 1
    return torch.from_numpy(np.unique(chosen).astype(np.uint32))


def check_index_codec(device: str, codec: IndexCodec, indices: torch.Tensor, numel: int) -> None:
    """Checks encoded bytes and the positions decoded from them."""

    def call(put: Put) -> tuple[Any, ...]:
        out = put(torch.zeros(kernels.max_index_bytes(codec, indices.numel(), numel), dtype=torch.uint8))
        size = kernels.encode_indices(codec, put(indices), numel, out)
        back = put(torch.zeros(indices.numel(), dtype=torch.uint32))
        kernels.decode_indices(codec, out[:size], indices.numel(), numel, back)
        return size, out[:size], back

    assert torch.equal(agree(device, call, offset=1)[2], indices)


def check_value_codec(device: str, codec: ValueCodec, values: torch.Tensor) -> None:
    """Checks bytes, rounding errors (also in place), scale and decoded values, for sparse and for dense vectors."""
    n = values.numel()

    def sparse(put: Put) -> tuple[Any, ...]:
        out = put(torch.zeros(kernels.max_value_bytes(codec, n), dtype=torch.uint8))
        error = put(torch.zeros(n, dtype=torch.float32))
        same = put(values)
        back = put(torch.zeros(n, dtype=torch.float32))
        size, scale = kernels.encode_values(codec, put(values), out, error)
        kernels.encode_values(codec, same, out, same)
        kernels.decode_values(codec, out[:size], n, scale, back)
        return size, scale, out, error, same, back

    def dense(put: Put) -> tuple[Any, ...]:
        out = put(torch.zeros(kernels.packed_bytes(codec, n), dtype=torch.uint8))
        error, back = put(torch.zeros(n, dtype=torch.float32)), put(torch.ones(n, dtype=torch.float32))
        kernels.pack_dense(codec, put(values), out, error)
        kernels.unpack_dense(codec, out, back, add=True)
        return out, error, back

    if bool(torch.isfinite(values).all()):
        agree(device, sparse, offset=3)
    if codec != ValueCodec.INT8:
        agree(device, dense, offset=1)


def check_hostile_indices(device: str, codec: IndexCodec, rounds: int) -> int:
    """Checks that damaged bytes get the reference's verdict and write only the output; returns how many are refused."""
    rng, refused = np.random.default_rng(int(codec)), 0
    for _ in range(rounds):
        numel = int(rng.choice([9, 128, 1000, 20_000]))
        indices = positions(numel, int(rng.integers(0, min(numel, 400))), int(rng.integers(1000)))
        out = torch.zeros(kernels.max_index_bytes(codec, indices.numel(), numel), dtype=torch.uint8)
        data = out[: kernels.encode_indices(codec, indices, numel, out)].clone()
        way = rng.integers(0, 3)
        if way == 0 and data.numel():
            data[rng.integers(0, data.numel())] ^= 1 << int(rng.integers(0, 8))
        elif way == 1:
            data = data[: int(rng.integers(0, data.numel() + 1))]
        else:
            data = torch.from_numpy(rng.integers(0, 256, data.numel(), dtype=np.uint8))
        nnz = indices.numel()

        def call(put: Put, data: torch.Tensor = data, nnz: int = nnz, numel: int = numel) -> tuple[Any, ...]:
            room = put(torch.full((nnz + 64,), 7, dtype=torch.int64).to(torch.uint32))
            try:
                kernels.decode_indices(codec, put(data), nnz, numel, room[32 : 32 + nnz])
            except WireError as error:
                return error.field, error.value, error.reason, octets(room[:32]), octets(room[32 + nnz :])
            return (room,)

        refused += len(agree(device, call)) > 1
    return refused


def check_hostile_values(device: str) -> None:
    """Checks that bad lengths, scales and values get the reference's verdict."""
    nan, cases = octets(torch.tensor([1.0, math.nan], dtype=torch.float32)), []
    cases.append((ValueCodec.FP32, nan, 2, 1.0))
    cases.append((ValueCodec.FP32, nan[:7], 2, 1.0))
    cases.append((ValueCodec.FP16, torch.zeros(4, dtype=torch.uint8), 2, -1.0))
    cases.append((ValueCodec.FP16, torch.full((4,), 255, dtype=torch.uint8), 2, 1.0))
    cases.append(
        (
            ValueCodec.INT8,
            torch.cat([octets(torch.tensor([-1.0], dtype=torch.float32)), torch.ones(2, dtype=torch.uint8)]),
            2,
            1.0,
        )
    )
    cases.append(
        (
            ValueCodec.INT8,
            torch.cat([octets(torch.tensor([1.0], dtype=torch.float32)), torch.full((2,), 128, dtype=torch.uint8)]),
            2,
            1.0,
        )
    )
    for codec, data, nnz, scale in cases:

        def call(put: Put, codec=codec, data=data, nnz=nnz, scale=scale) -> tuple[Any, ...]:
            try:
                kernels.decode_values(codec, put(data), nnz, scale, put(torch.zeros(nnz, dtype=torch.float32)))
            except WireError as error:
                return error.field, str(error.value), error.reason
            return ("nothing wrong",)

        assert len(agree(device, call)) == 3


def check_unsorted(device: str) -> None:
    """Checks that positions that do not ascend are refused with the reference's message."""
    for codec in (IndexCodec.RAW, IndexCodec.BITPACK, IndexCodec.RICE, IndexCodec.BITMAP):
        for bad in ([1, 5, 5], [3, 2, 9], [1, 2, 10]):

            def call(put: Put, codec: IndexCodec = codec, bad: list[int] = bad) -> tuple[Any, ...]:
                out = put(torch.zeros(64, dtype=torch.uint8))
                try:
                    kernels.encode_indices(codec, put(torch.tensor(bad, dtype=torch.uint32)), 10, out)
                except KernelError as error:
                    return (str(error),)
                return ("nothing wrong",)

            assert "is not above its predecessor" in agree(device, call)[0]
