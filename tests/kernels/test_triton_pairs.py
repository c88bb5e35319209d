"""Whole bodies by the Triton kernels, interpreted: the reference's bytes, pairs and errors, with few waits."""

from __future__ import annotations

from typing import Any

import pair_cases
import pytest
import torch
from helpers import Cluster, assert_restored, gradient, plan, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecomm import kernels
from sparsecomm.compress import ThresholdTopK
from sparsecomm.errors import KernelError, WireError
from sparsecomm.exchange import Plan
from sparsecomm.kernels import checksum
from sparsecomm.kernels.triton.launch import joined, runs
from sparsecomm.runtime import device
from sparsecomm.types import IndexCodec, ValueCodec

interpreted = pytest.mark.skipif(
    "triton" not in kernels.available_paths(),
    reason="Triton's interpreter cannot run here: no triton, or a GPU is there",
)
SIZES = ((0, 0), (0, 9), (1, 1), (1, 900), (129, 4000), (300, 1300))


class Waits(device.Inline):
    """The CPU's side, which counts the waits that a device would cause."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.read_ = 0

    @property
    def count(self) -> int:
        return len(self.fetched) + self.read_

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.fetched.append(source.numel())
        return super().fetch(source, target)

    def read(self, numbers: torch.Tensor) -> Any:
        self.read_ += 1
        return super().read(numbers)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    counted = Waits()
    monkeypatch.setattr(device, "_INLINE", counted)
    return counted


@interpreted
@pytest.mark.parametrize("index_codec", list(IndexCodec))
def test_payloads_have_the_references_bytes(index_codec: IndexCodec) -> None:
    for seed, (nnz, numel) in enumerate(SIZES):
        for value_codec in (ValueCodec.FP16, ValueCodec((seed + int(index_codec)) % 4)):
            pair_cases.check_encode("cpu", (index_codec, value_codec), nnz, numel, seed)


@interpreted
@pytest.mark.parametrize("index_codec", list(IndexCodec))
def test_payloads_of_one_codec_are_decoded_together(index_codec: IndexCodec) -> None:
    value_codec = ValueCodec(int(index_codec) % 4)
    made = [pair_cases.payload(r, index_codec, value_codec, *size) for r, size in enumerate(SIZES)]
    pair_cases.check_decoded("cpu", made)
    pair_cases.check_decoded("cpu", made[:1])


@interpreted
def test_payloads_of_different_codecs_are_decoded_together() -> None:
    codecs = [(index, value) for index in IndexCodec for value in (ValueCodec.FP16, ValueCodec.INT8)]
    pair_cases.check_decoded("cpu", [pair_cases.payload(r, *c, 140, 900) for r, c in enumerate(codecs)])
    pair_cases.check_decoded("cpu", [])


codecs = st.tuples(st.sampled_from(IndexCodec), st.sampled_from(ValueCodec))
sizes = st.integers(0, 700).flatmap(lambda n: st.tuples(st.integers(0, min(n, 200)), st.just(n)))


@interpreted
@given(
    st.lists(st.tuples(codecs, sizes), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=2),
    st.integers(0, 2**31),
)
def test_damaged_payloads_get_the_verdict_of_a_loop_over_the_reference(
    wanted: list[Any], damages: list[tuple[int, int]], seed: int
) -> None:
    made = [pair_cases.payload(r, *codec, *size) for r, (codec, size) in enumerate(wanted)]
    for who, way in damages:
        made[who % len(made)] = pair_cases.damaged(made[who % len(made)], way, seed)
    pair_cases.check_decode("cpu", [said for said, _ in made], pair_cases.together(made))


@interpreted
def test_the_first_damaged_payload_is_named_and_checks_come_first() -> None:
    made = [pair_cases.payload(r, IndexCodec.RICE, ValueCodec.FP32, 130, 2000) for r in range(4)]
    for who in (2, 1):
        made[who][1][0] = 255  # a block's parameter
    said, bodies = [s for s, _ in made], [b for _, b in made]
    assert pair_cases.check_decode("cpu", said, bodies)[:3] == (1, 7, "index_params")

    for i in (0, 2, 3):
        said[i].body_crc = kernels.crc32c(bodies[i])
    assert pair_cases.check_decode("cpu", said, bodies, verify=True)[:3] == (1, 7, "body_crc")
    said[1].body_bytes += 1
    assert pair_cases.check_decode("cpu", said, bodies, verify=True)[:3] == (1, 7, "length")


@interpreted
@pytest.mark.parametrize(
    ("codec", "octets", "nnz", "field"),
    [
        (IndexCodec.BITPACK, [33, 0, 0, 0, 0, 0], 1, "index_params"),
        (IndexCodec.RICE, [32, 0, 0, 0, 0, 1], 1, "index_params"),
        (IndexCodec.RICE, [0, 1, 0], 1, "indices"),  # a byte without ones
        (IndexCodec.BITPACK, [1, 2], 1, "indices"),  # bits behind the last gap
        (IndexCodec.BITMAP, [4, 32], 2, "indices"),  # bits behind numel
        (IndexCodec.RAW, [3, 0, 0, 0, 3, 0, 0, 0], 2, "indices"),
    ],
)
def test_what_one_check_alone_finds(codec: IndexCodec, octets: list[int], nnz: int, field: str) -> None:
    good, body = pair_cases.payload(0, codec, ValueCodec.FP32, 2, 12)
    said = pair_cases.Said(1, codec, ValueCodec.FP32, nnz, 12, len(octets))
    bad = torch.tensor(octets + [0] * 4 * nnz, dtype=torch.uint8)
    assert pair_cases.check_decode("cpu", [good, said], [body, bad])[:3] == (1, 7, field)


@interpreted
def test_a_long_code_takes_a_second_copy(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecomm.kernels.triton import pairs as triton_pairs

    pair_cases.check_encode("cpu", (IndexCodec.RICE, ValueCodec.FP16), 300, 9000, 1)
    assert waits.count == 1
    monkeypatch.setattr(triton_pairs, "estimate_index_bytes", lambda *_: 0)
    monkeypatch.setattr(triton_pairs, "_SLACK", 5)
    pair_cases.check_encode("cpu", (IndexCodec.RICE, ValueCodec.FP16), 300, 9000, 1)
    assert waits.count == 3
    assert len(waits.fetched) == 3


@interpreted
def test_what_does_not_fit_is_refused() -> None:
    made = pair_cases.payload(0, IndexCodec.RAW, ValueCodec.FP32, 3, 9)
    raw, rice = (pair_cases.Said(0, codec, ValueCodec.FP32, 3, 9) for codec in (IndexCodec.RAW, IndexCodec.RICE))
    indices, values = pair_cases.pairs(3, 9, 1)
    out = torch.zeros(200, dtype=torch.uint8)
    kernels.set_path("triton")
    try:
        with pytest.raises(KernelError, match="have 2 and 2 elements, need 3"):
            kernels.decode_pairs([made[0]], [made[1]], indices[:2].clone(), values[:2].clone())
        with pytest.raises(KernelError, match="head must be at least 32"):
            kernels.encode_pairs(raw, indices, values, out, head=24)
        with pytest.raises(KernelError, match="out has 20 bytes on cpu"):
            kernels.encode_pairs(raw, indices, values, out[:20], head=88)
        with pytest.raises(KernelError, match="is not above its predecessor"):
            kernels.encode_pairs(rice, indices[[2, 1, 0]], values, out, head=88)
    finally:
        kernels.set_path(None)


def test_neighbours_in_memory_become_one() -> None:
    whole, other = torch.arange(10.0, dtype=torch.float32), torch.arange(3.0, dtype=torch.float32)
    parts = [whole[:2], whole[2:2], whole[2:5], other[:1], whole[5:], whole[:0]]
    assert [run.tolist() for run in runs(parts)] == [[0, 1, 2, 3, 4], [0], [5, 6, 7, 8, 9]]
    assert joined([whole[:4], whole[4:]], other).data_ptr() == whole.data_ptr()
    assert joined([whole[8:], whole[:1]], other).tolist() == [8, 9, 0]
    assert joined([whole[:0]], other) is other


class Scalars(TorchDispatchMode):
    """Counts the conversions of tensors to numbers that bypass `Side.read`: item, bool, int, float."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@interpreted
@pytest.mark.parametrize("size", [2, 4])
def test_an_exchange_waits_three_times_whatever_the_number_of_ranks(size: int, waits: Waits) -> None:
    """The first step selects exactly; its threshold fits the second step, because without feedback nothing is kept."""
    cluster, scalars = Cluster(size, 300), Scalars()
    kernels.set_path("triton")
    try:
        for step in range(2):
            before = waits.count
            grads = [gradient("normal", 300, torch.float32, r) for r in range(size)]
            options = {"value_codec": ValueCodec.FP16, "feedback": None}
            with scalars:
                cluster.step(grads, plan(300, compressor=ThresholdTopK(0.05), step=step, **options))
            assert waits.count - before == 3 * size, "counts, payload, verdicts"
    finally:
        kernels.set_path(None)
    assert scalars.count == 0


@interpreted
def test_one_damaged_payload_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums are switched off, so that only the device's verdict can stop the damage."""
    monkeypatch.setattr(checksum, "check_body", lambda header, body: None)
    n, size = 300, 3
    told = {}
    for path in ("triton", "reference"):
        kernels.set_path(path)
        try:
            told[path] = damaged_exchange(n, size, plan(n, value_codec=ValueCodec.FP16))
        finally:
            kernels.set_path(None)
    assert told["triton"] == told["reference"]
    assert "from rank 2 for bucket 4: index_params" in told["triton"]


def damaged_exchange(n: int, size: int, how: Plan) -> str:
    """Returns the error of rank 0, which gets a damaged body of rank 2; asserts that rank 0 applies nothing."""
    cluster = Cluster(size, n, bucket=4)
    for r, residual in enumerate(cluster.residuals):
        residual.copy_(gradient("normal", n, torch.float32, 50 + r))
    before = [residual.clone() for residual in cluster.residuals]
    grads = [gradient("normal", n, torch.float32, r) for r in range(size)]
    sent = [g.clone() for g in grads]

    def tamper(source: int, dest: int, message: torch.Tensor) -> torch.Tensor:
        if (source, dest) == (2, 0) and message.numel() % 88:
            message[0] = 99
        return message

    cluster.world.tamper = tamper
    outcomes = cluster.exchange(grads, how)
    assert isinstance(outcomes[0], WireError)
    assert (outcomes[0].rank, outcomes[0].bucket) == (2, 4)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes[1:])
    assert same_bits(grads[0], sent[0])
    assert_restored([cluster.residuals[0]], [before[0]], [sent[0]])
    assert same_bits(grads[1], grads[2])
    return str(outcomes[0])
