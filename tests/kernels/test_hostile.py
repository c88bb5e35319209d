"""Decoders raise the reference's errors for bad bytes, and write only to their output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_path import by_reference

from sparsecomm import kernels
from sparsecomm.errors import KernelError, WireError
from sparsecomm.types import IndexCodec, ValueCodec

GUARD = 0xDEADBEEF


def u8(*octets: int) -> torch.Tensor:
    return torch.tensor(octets, dtype=torch.uint8)


def verdict_on_indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int) -> tuple[object, ...]:
    """Returns the indices, or the error's field, value and reason; checks that the words around the output stay."""
    room = torch.full((nnz + 64,), GUARD, dtype=torch.int64).to(torch.uint32)
    try:
        kernels.decode_indices(codec, data, nnz, numel, room[32 : 32 + nnz])
        result: tuple[object, ...] = tuple(room[32 : 32 + nnz].tolist())
    except WireError as error:
        result = (error.field, error.value, error.reason)
    assert (room[:32].to(torch.int64) == GUARD).all()
    assert (room[32 + nnz :].to(torch.int64) == GUARD).all()
    return result


def damaged(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    way = rng.integers(0, 5)
    if way == 0 and data.size:
        data[rng.integers(0, data.size)] ^= 1 << rng.integers(0, 8)
    elif way == 1:
        data = data[: int(rng.integers(0, data.size + 1))]
    elif way == 2:
        data = np.concatenate([data, rng.integers(0, 2, 2, dtype=np.uint8)])
    elif way == 3:
        data = rng.integers(0, 256, data.size, dtype=np.uint8)
    elif data.size:
        data[: rng.integers(1, data.size + 1)] = rng.choice([0, 1, 32, 31, 255])
    return np.ascontiguousarray(data)


@pytest.mark.parametrize("codec", [c for c in IndexCodec if c != IndexCodec.DENSE])
def test_bad_index_bytes_get_the_verdict_of_the_reference(path: str, codec: IndexCodec) -> None:
    rng = np.random.default_rng(int(codec))
    refused = 0
    for _ in range(400):
        big = codec != IndexCodec.BITMAP and rng.random() < 0.3
        numel = int(rng.choice([2**31 + 1, 2**32])) if big else int(rng.choice([1, 9, 128, 1000, 20_000]))
        nnz = int(rng.integers(0, min(numel, 500) + 1))
        chosen = np.unique(rng.integers(0, numel, nnz)).astype(np.uint32)
        out = torch.empty(kernels.max_index_bytes(codec, chosen.size, numel), dtype=torch.uint8)
        size = kernels.encode_indices(codec, torch.from_numpy(chosen), numel, out)
        data = torch.from_numpy(damaged(out[:size].numpy().copy(), rng))
        count = chosen.size if rng.random() < 0.8 else nnz
        mine = verdict_on_indices(codec, data, count, numel)
        truth = by_reference(path, lambda d=data, c=count, n=numel: verdict_on_indices(codec, d, c, n))
        assert mine == truth
        refused += bool(mine) and isinstance(mine[0], str)
    assert refused > 100


@pytest.mark.parametrize(
    ("codec", "data", "nnz", "numel", "field"),
    [
        (IndexCodec.RAW, u8(1, 0, 0, 0), 2**33, 2**34, "numel"),
        (IndexCodec.RAW, u8(1, 0, 0, 0), 3, 2, "nnz"),
        (IndexCodec.RAW, u8(1, 0, 0, 0), -1, 2, "nnz"),
        (IndexCodec.RAW, u8(), 1, 0, "nnz"),
        (IndexCodec.RAW, u8(1, 0, 0), 1, 2, "index_bytes"),
        (IndexCodec.RAW, u8(2, 0, 0, 0), 1, 2, "indices"),
        (IndexCodec.RAW, u8(1, 0, 0, 0, 1, 0, 0, 0), 2, 2, "indices"),
        (IndexCodec.DENSE, u8(), 1, 2, "nnz"),
        (IndexCodec.DENSE, u8(0), 2, 2, "index_bytes"),
        (IndexCodec.BITMAP, u8(0b101), 1, 2, "indices"),  # a padding bit
        (IndexCodec.BITMAP, u8(0b11), 1, 2, "indices"),  # two ones
        (IndexCodec.BITMAP, u8(1, 0), 1, 2, "index_bytes"),
        (IndexCodec.BITPACK, u8(33, 0, 0, 0, 0, 0), 1, 2, "index_params"),
        (IndexCodec.BITPACK, u8(), 1, 2, "index_bytes"),
        (IndexCodec.BITPACK, u8(1), 1, 2, "index_bytes"),
        (IndexCodec.BITPACK, u8(1, 0b10), 1, 2, "indices"),  # a padding bit
        (IndexCodec.BITPACK, u8(2, 0b10), 1, 2, "indices"),  # index 2 of 2
        (IndexCodec.RICE, u8(32, 0, 0, 0, 0, 1), 1, 2, "index_params"),
        (IndexCodec.RICE, u8(0), 1, 2, "index_bytes"),
        (IndexCodec.RICE, u8(0, 0), 1, 2, "indices"),  # no one
        (IndexCodec.RICE, u8(0, 0b101), 1, 2, "indices"),  # a one too many
        (IndexCodec.RICE, u8(0, 0b100), 1, 2, "indices"),  # index 2 of 2
        (IndexCodec.RICE, u8(1, 0b10, 1), 1, 2, "indices"),  # a padding bit of the low part
        (IndexCodec.RICE, u8(0, 1, 0), 1, 9, "indices"),  # a byte behind the last one
    ],
)
def test_each_check_names_its_field(
    path: str, codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, field: str
) -> None:
    out = torch.zeros(max(min(nnz, 8), 0), dtype=torch.uint32)
    with pytest.raises(WireError) as caught:
        kernels.decode_indices(codec, data, nnz, numel, out)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("codec", "data", "nnz", "scale", "field"),
    [
        (ValueCodec.FP32, u8(0, 0, 0), 1, 1.0, "value_bytes"),
        (ValueCodec.FP32, u8(0, 0, 0x80, 0x7F), 1, 1.0, "values"),
        (ValueCodec.BF16, u8(0xC0, 0xFF), 1, 1.0, "values"),
        (ValueCodec.FP16, u8(0, 0x7C), 1, 1.0, "values"),
        (ValueCodec.FP16, u8(0, 0x7B), 1, 2.0**120, "values"),  # finite only as a half
        (ValueCodec.FP16, u8(0, 0x3C), 1, 0.0, "value_scale"),
        (ValueCodec.FP16, u8(0, 0x3C), 1, -1.0, "value_scale"),
        (ValueCodec.FP16, u8(0, 0x3C), 1, float("nan"), "value_scale"),
        (ValueCodec.FP16, u8(0, 0x3C), 1, 1e300, "value_scale"),  # infinite in float32
        (ValueCodec.INT8, u8(0, 0, 0x80, 0x3F, 0x80), 1, 1.0, "values"),  # -128
        (ValueCodec.INT8, u8(0, 0, 0x80, 0xBF, 1), 1, 1.0, "value_scale"),  # -1.0
        (ValueCodec.INT8, u8(0, 0, 0xC0, 0x7F, 1), 1, 1.0, "value_scale"),  # NaN
        (ValueCodec.INT8, u8(0xFF, 0xFF, 0x7F, 0x7F, 2), 1, 1.0, "values"),  # overflows
        (ValueCodec.INT8, u8(0, 0, 0x80, 0x3F), 1, 1.0, "value_bytes"),
    ],
)
def test_bad_values_are_refused_by_field(
    path: str, codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, field: str
) -> None:
    def field_of() -> str:
        with pytest.raises(WireError) as caught:
            kernels.decode_values(codec, data, nnz, scale, torch.empty(nnz, dtype=torch.float32))
        return caught.value.field

    assert field_of() == field == by_reference(path, field_of)


VALUE_BYTES = {  # 1.0, -0.5, 3.0 by hand
    ValueCodec.FP32: ("0000803f 000000bf 00004040", 1.0),
    ValueCodec.BF16: ("803f 00bf 4040", 1.0),
    # The largest is 1.5 * 2, so s = 2 / 2**14 = 2**-13: 8192, -4096, 24576 as halves.
    ValueCodec.FP16: ("0070 00ec 0076", 2.0**-13),
    # 3 / 127 = 0x3cc18306; 42.33, -21.17, 127 round to 42, -21, 127.
    ValueCodec.INT8: ("0683c13c 2a eb 7f", 1.0),
}


@pytest.mark.parametrize("codec", ValueCodec)
def test_value_bytes_are_those_worked_by_hand(path: str, codec: ValueCodec) -> None:
    out = torch.empty(16, dtype=torch.uint8)
    size, scale = kernels.encode_values(codec, torch.tensor([1.0, -0.5, 3.0], dtype=torch.float32), out)
    want, want_scale = VALUE_BYTES[codec]
    assert bytes(out[:size].numpy()) == bytes.fromhex(want)
    assert scale == want_scale


@pytest.mark.parametrize("codec", ValueCodec)
def test_the_largest_floats_saturate(path: str, codec: ValueCodec) -> None:
    top = torch.finfo(torch.float32).max
    values = torch.tensor([top, -top, top / 2], dtype=torch.float32)
    out = torch.empty(16, dtype=torch.uint8)
    error = torch.empty(3, dtype=torch.float32)
    back = torch.empty(3, dtype=torch.float32)
    size, scale = kernels.encode_values(codec, values, out, error)
    kernels.decode_values(codec, out[:size], 3, scale, back)
    assert torch.equal(values - back, error)
    assert float((error / values).abs().max()) < 0.01


def test_a_nonzero_count_is_exact_at_the_end_of_the_index_space(path: str) -> None:
    last = torch.tensor([0, 2**32 - 2, 2**32 - 1], dtype=torch.int64).to(torch.uint32)
    for codec in (IndexCodec.RAW, IndexCodec.BITPACK, IndexCodec.RICE):
        out = torch.empty(kernels.max_index_bytes(codec, 3, 2**32), dtype=torch.uint8)
        data, got = out[: kernels.encode_indices(codec, last, 2**32, out)], torch.empty_like(last)
        kernels.decode_indices(codec, data, 3, 2**32, got)
        assert torch.equal(got, last)


def test_encoding_refuses_what_is_not_ascending(path: str) -> None:
    out = torch.empty(64, dtype=torch.uint8)
    for wrong in ([1, 1], [2, 1], [3, 10]):
        for codec in (IndexCodec.RAW, IndexCodec.BITPACK, IndexCodec.RICE, IndexCodec.BITMAP):
            with pytest.raises(KernelError, match=r"indices\[1\]"):
                kernels.encode_indices(codec, torch.tensor(wrong, dtype=torch.int64).to(torch.uint32), 10, out)


def test_scratch_is_reused_and_can_be_released(path: str) -> None:
    kernels.release_scratch()
    start = kernels.scratch_bytes()
    grad = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    room = torch.empty(1000, dtype=torch.uint32), torch.empty(1000, dtype=torch.float32)
    kernels.exact_topk(grad, torch.zeros(100_000, dtype=torch.float32), 1000, *room)
    held = kernels.scratch_bytes()
    for _ in range(3):
        kernels.exact_topk(grad, torch.zeros(100_000, dtype=torch.float32), 1000, *room)
        assert kernels.scratch_bytes() == held
    assert held - start < 100_000 * 4
    kernels.release_scratch()
    assert kernels.scratch_bytes() == start
