"""Truncated, flipped, random and hostile payloads: a WireError or a valid result, never anything else.

Hypothesis draws the situation and a seed; a loop then tries many mutations of it, since drawing each byte would cost
more than the decoders do. A failure prints the bytes that caused it.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import Sent, payload_of, sealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, Header, decode_body, read_header

WANTED = 10_000  # hostile payloads on every native kernel path
fuzz = settings(
    max_examples=max(60, settings().max_examples),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Count = Counter[tuple[str, str]]

# offset and struct format of every header field behind magic and version
FIELDS = [(5, "B"), (6, "B"), (7, "B"), (8, "B"), (9, "B"), (10, "H"), (12, "I"), (16, "I"), (20, "I"), (24, "I")]
FIELDS += [(28, "Q"), (36, "Q"), (44, "Q"), (52, "Q"), (60, "Q"), (68, "Q"), (76, "I"), (80, "I")]
SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8}


@st.composite
def payloads(draw: st.DrawFn) -> Sent:
    index_codec, value_codec = draw(st.sampled_from(IndexCodec)), draw(st.sampled_from(ValueCodec))
    numel = draw(st.integers(1, 700))
    nnz = numel if index_codec == IndexCodec.DENSE else draw(st.integers(0, numel))
    return payload_of(index_codec, value_codec, numel, nnz, draw(st.integers(0, 2**31)))


SLOW = ("reference", "triton")  # checksums in numpy, and kernels in Triton's interpreter


def loops() -> int:
    """Mutations of one drawn payload."""
    return 2 if kernels.current_path() in SLOW else 60


def interesting(rng: random.Random, limit: int, old: int) -> int:
    """A number that is likely to break something."""
    choices = [
        0,
        1,
        limit,
        limit - 1,
        old + 1,
        old - 1,
        old * 2,
        old // 2,
        old ^ (1 << rng.randrange(limit.bit_length())),
    ]
    choices += [2**32, 2**32 + 1, 2**31, 2**63, 127, 128, 129, rng.randrange(limit + 1), rng.randrange(1000)]
    return rng.choice(choices) % (limit + 1)


def mutated_header(data: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """A header with one to three fields changed and the checksum made right."""
    header = data[:HEADER_BYTES].clone()
    for offset, form in rng.sample(FIELDS, rng.choice([1, 1, 1, 2, 3])):
        (old,) = struct.unpack_from("<" + form, header.numpy(), offset)
        struct.pack_into("<" + form, header.numpy(), offset, interesting(rng, 256 ** SIZES[form] - 1, old))
    return sealed(header)


def mutated_bytes(data: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Bytes flipped, cut, extended, exchanged or overwritten."""
    out = data.clone()
    kind = rng.randrange(6)
    if not out.numel() or kind == 0:
        return torch.cat(
            [out, torch.tensor([rng.randrange(256) for _ in range(rng.randrange(1, 9))], dtype=torch.uint8)]
        )
    at = rng.randrange(out.numel())
    if kind == 1:
        return out[:at]
    if kind == 2:
        out[at] = rng.choice([0, 1, 31, 32, 33, 127, 128, 255])
    elif kind == 3:
        length = rng.randrange(1, 17)
        out[at : at + length] = rng.choice([0, 255])
    elif kind == 4:
        other = rng.randrange(out.numel())
        out[at], out[other] = out[other].clone(), out[at].clone()
    else:
        for _ in range(rng.randrange(1, 5)):
            out[rng.randrange(out.numel())] ^= 1 << rng.randrange(8)
    return out


def assert_sane(header: Header) -> None:
    """What a receiver relies on once a header was accepted."""
    assert 0 <= header.rank < header.world
    assert 0 <= header.nnz <= header.numel <= 2**32
    assert header.index_bytes <= header.numel + 16 or header.index_bytes <= 6 * header.nnz + 16
    assert header.value_bytes <= 4 * header.nnz + 4096
    assert 0.0 < header.value_scale < float("inf")


def decodes(header: Header, body: torch.Tensor) -> bool:
    """Decodes; returns whether that was accepted, having checked what came out."""
    room = header.nnz if header.body_bytes == body.numel() else 0  # a receiver has compared the lengths before
    indices = torch.full((room,), 2**32 - 1, dtype=torch.uint32)
    values = torch.full((room,), float("nan"), dtype=torch.float32)
    try:
        decode_body(header, body, indices, values)
    except WireError as error:
        if (error.rank, error.bucket) != (header.rank, header.bucket) or error.field not in str(error):
            raise AssertionError(f"does not say where it comes from: {error}") from error
        return False
    positions = indices.to(torch.int64)
    assert bool((positions[1:] > positions[:-1]).all()), "indices must ascend"
    assert not room or int(positions[-1]) < header.numel
    assert bool(values.isfinite().all())
    return True


def attempt(count: Count, kind: str, data: torch.Tensor, action: Callable[[], object]) -> None:
    """Runs one hostile input; nothing but a WireError may come of it, else the bytes are shown."""
    count[kernels.current_path(), kind] += 1
    try:
        action()
    except WireError:
        pass
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}; bytes: {bytes(data.numpy()).hex()}") from error


@fuzz
@given(sent=payloads(), seed=st.integers(0, 2**63))
def test_hostile_headers_with_right_checksums(count: Count, sent: Sent, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(loops()):
        data = mutated_header(sent.data, rng)
        attempt(count, "header", data, lambda data=data: assert_sane(read_header(data)))


@fuzz
@given(sent=payloads(), seed=st.integers(0, 2**63))
def test_hostile_bodies_with_right_checksums(count: Count, sent: Sent, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(loops()):
        body = mutated_bytes(sent.body, rng)
        index_bytes = min(sent.header.index_bytes, body.numel())
        header = replace(
            sent.header,
            index_bytes=index_bytes,
            value_bytes=body.numel() - index_bytes,
            body_crc=kernels.crc32c(body),
        )
        attempt(count, "body", body, lambda header=header, body=body: decodes(header, body))


@fuzz
@given(sent=payloads(), seed=st.integers(0, 2**63))
def test_hostile_headers_over_good_bodies(count: Count, sent: Sent, seed: int) -> None:
    """What passes the header's checks must still not mislead the decoders."""
    rng = random.Random(seed)

    def whole(data: torch.Tensor) -> None:
        header = read_header(data)
        assert_sane(header)
        decodes(replace(header, body_crc=sent.header.body_crc), sent.body)

    for _ in range(loops()):
        data = mutated_header(sent.data, rng)
        attempt(count, "whole", data, lambda data=data: whole(data))


@fuzz
@given(sent=payloads(), seed=st.integers(0, 2**63))
def test_damage_anywhere_is_found_by_a_checksum(count: Count, sent: Sent, seed: int) -> None:
    rng = random.Random(seed)

    for _ in range(loops()):
        data = sent.data.clone()
        if rng.random() < 0.5:
            data = data[: rng.randrange(data.numel())]
        else:
            data[rng.randrange(data.numel())] ^= 1 << rng.randrange(8)
        count[kernels.current_path(), "damaged"] += 1
        try:
            header = read_header(data)
            accepted = decodes(header, data[HEADER_BYTES:])
        except WireError:
            accepted = False
        assert not accepted, bytes(data.numpy()).hex()


@fuzz
@given(seed=st.integers(0, 2**63))
def test_random_bytes_as_indices_and_values(count: Count, seed: int) -> None:
    rng = random.Random(seed)

    def indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int) -> None:
        out = torch.empty(nnz, dtype=torch.uint32)
        kernels.decode_indices(codec, data, nnz, numel, out)
        positions = out.to(torch.int64)
        assert bool((positions[1:] > positions[:-1]).all())
        assert not nnz or int(positions[-1]) < numel

    def values(codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float) -> None:
        out = torch.empty(nnz, dtype=torch.float32)
        kernels.decode_values(codec, data, nnz, scale, out)
        assert bool(out.isfinite().all())

    for _ in range(loops() // 2):
        numel = rng.choice([1, 100, 2**16, 2**31, 2**32, rng.randrange(1, 2**32)])
        codec = rng.choice([IndexCodec.RAW, IndexCodec.BITPACK, IndexCodec.RICE, IndexCodec.BITMAP])
        nnz = rng.randrange(min(numel, 300) + 1)
        weights = rng.choice([range(256), range(33), (0, 1, 255), (0,)])
        data = torch.tensor([rng.choice(weights) for _ in range(rng.randrange(1200))], dtype=torch.uint8)
        if codec == IndexCodec.RAW and rng.random() < 0.8:
            data = torch.cat([data, torch.zeros(4 * nnz, dtype=torch.uint8)])[: 4 * nnz]
        attempt(count, "indices", data, lambda a=(codec, data, nnz, numel): indices(*a))
        value_codec = rng.choice(list(ValueCodec))
        length = kernels.max_value_bytes(value_codec, nnz) + rng.choice([0, 0, 0, 1, -1])
        data = torch.tensor([rng.choice(weights) for _ in range(max(0, length))], dtype=torch.uint8)
        scale = rng.choice([1.0, 0.0, -1.0, float("nan"), float("inf"), 2.0**113, 2.0**-126, 1e-320])
        attempt(count, "values", data, lambda a=(value_codec, data, nnz, scale): values(*a))


@pytest.mark.parametrize("codec", [IndexCodec.BITPACK, IndexCodec.RICE])
def test_gaps_that_would_wrap_around_are_refused(count: Count, codec: IndexCodec) -> None:
    """All ones: the widest gaps a block can hold, whose sums overflow 32 and 64 bits."""
    slow = kernels.current_path() == "triton"
    for nnz in (1, 129) if slow else (1, 2, 127, 128, 129, 300):
        for parameter in (0, 1, 31, 32, 33) if slow else range(34):
            blocks = -(-nnz // 128)
            sizes = [-(-min(128, nnz - 128 * b) * min(parameter, 32) // 8) for b in range(blocks)]
            head = torch.full((blocks,), parameter, dtype=torch.uint8)
            data = torch.cat(
                [head, torch.full((sum(sizes),), 255, dtype=torch.uint8), torch.full((40,), 255, dtype=torch.uint8)]
            )
            for length in range(head.numel(), data.numel() + 1, max(1, data.numel() // 7)):
                part = data[:length]
                out = torch.empty(nnz, dtype=torch.uint32)
                attempt(
                    count, "wrap", part, lambda p=part, n=nnz, o=out: kernels.decode_indices(codec, p, n, 2**32 - 1, o)
                )


def test_at_least_ten_thousand_hostile_payloads_were_tried(
    count: Count, path: str, request: pytest.FixtureRequest
) -> None:
    ran = [item for item in request.session.items if f"[{path}" in item.nodeid and "test_fuzz_payloads" in item.nodeid]
    if len(ran) < 8:
        pytest.skip("only a part of the fuzz tests was selected")
    if path not in SLOW:
        assert sum(n for (where, _), n in count.items() if where == path) >= WANTED
