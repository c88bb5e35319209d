"""Dense segments: the same bytes, sums and rounding errors on every path."""

from __future__ import annotations

import pytest
import torch
from by_path import by_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vectors import same_bits, seeds, vector

from sparsecomm import kernels
from sparsecomm.errors import KernelError
from sparsecomm.types import ValueCodec

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
codecs = st.sampled_from([ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16])
MAX32 = torch.finfo(torch.float32).max


@many
@given(
    codec=codecs,
    n=st.sampled_from([0, 1, 15, 16, 17, 1000]),
    kind=st.sampled_from(["normal", "wide", "nonfinite"]),
    factor=st.sampled_from([1.0, 1e-38, 1e-3, 1e38]),
    seed=seeds,
)
def test_packing_equals_the_reference_and_loses_nothing(
    path: str, codec: ValueCodec, n: int, kind: str, factor: float, seed: int
) -> None:
    values = vector(kind, n, seed) * factor
    nbytes = kernels.packed_bytes(codec, n)
    mine, truth = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    error, expected = torch.full((n,), 7.0, dtype=torch.float32), torch.full((n,), 7.0, dtype=torch.float32)
    kernels.pack_dense(codec, values, mine, error)
    by_reference(path, lambda: kernels.pack_dense(codec, values, truth, expected))
    assert same_bits(mine, truth)
    assert same_bits(error + 0.0, expected + 0.0)
    read = torch.full((n,), 7.0, dtype=torch.float32)
    kernels.unpack_dense(codec, mine, read)
    finite = values.isfinite()
    assert torch.equal(read.isfinite(), finite), "finite stays finite, and only that"
    assert torch.equal((read.double() + error.double())[finite], values.double()[finite])
    assert bool((error[~finite] == 0).all())
    added, sums = vector("normal", n, seed + 1), vector("normal", n, seed + 1)
    kernels.unpack_dense(codec, mine, added, add=True)
    by_reference(path, lambda: kernels.unpack_dense(codec, mine, sums, add=True))
    assert same_bits(added.nan_to_num(1.5), sums.nan_to_num(1.5))


@pytest.mark.parametrize("codec", [ValueCodec.FP16, ValueCodec.BF16])
def test_the_ends_of_the_range_survive(path: str, codec: ValueCodec) -> None:
    values = torch.tensor([MAX32, -MAX32, 1.0, 0.0, -0.0, 2.0**-140], dtype=torch.float32)
    for part in (values, values[2:].clone(), values[5:].clone()):
        out, error = torch.empty(kernels.packed_bytes(codec, part.numel()), dtype=torch.uint8), torch.empty_like(part)
        kernels.pack_dense(codec, part, out, error)
        read = torch.empty_like(part)
        kernels.unpack_dense(codec, out, read)
        assert bool(read.isfinite().all())
        assert torch.equal(read.double() + error.double(), part.double())
        assert abs(float(read[0])) == pytest.approx(float(part[0].abs()), rel=2.0**-8, abs=2.0**-134)


def test_odd_addresses_are_read(path: str) -> None:
    values = torch.arange(20.0, dtype=torch.float32)
    for codec in (ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16):
        room = torch.zeros(kernels.packed_bytes(codec, 20) + 1, dtype=torch.uint8)
        kernels.pack_dense(codec, values, room[1:])
        read = torch.empty(20, dtype=torch.float32)
        kernels.unpack_dense(codec, room[1:], read)
        assert torch.equal(read, values)


def test_unfit_arguments_are_refused(path: str) -> None:
    values = torch.ones(4, dtype=torch.float32)
    with pytest.raises(KernelError, match="INT8"):
        kernels.packed_bytes(ValueCodec.INT8, 4)
    with pytest.raises(KernelError, match=r"out has 8 bytes, 4 values as FP16 need 12"):
        kernels.pack_dense(ValueCodec.FP16, values, torch.empty(8, dtype=torch.uint8))
    with pytest.raises(KernelError, match="error has 3 elements"):
        kernels.pack_dense(
            ValueCodec.BF16, values, torch.empty(8, dtype=torch.uint8), torch.empty(3, dtype=torch.float32)
        )
    with pytest.raises(KernelError, match=r"data has 7 bytes, 4 values as BF16 need 8"):
        kernels.unpack_dense(ValueCodec.BF16, torch.empty(7, dtype=torch.uint8), values)
