"""Payloads of pairs: round trips with every codec, rounding, and damaged bodies."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, payload_of
from hypothesis import given
from hypothesis import strategies as st
from worked_example import worked_example, worked_part

from sparsecomm.errors import WireError
from sparsecomm.exchange import blank_header
from sparsecomm.exchange.method import method_named
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import (
    FLAG_ERROR,
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    check_body,
    choose_index_codec,
    decode_body,
    encode_error,
    largest_value,
    max_payload_bytes,
    read_header,
)

codecs = st.tuples(st.sampled_from(IndexCodec), st.sampled_from(ValueCodec))


@given(codecs, st.integers(0, 600), st.floats(0.0, 1.0), st.integers(0, 2**31), st.integers(-40, 37))
def test_payloads_decode_to_what_was_encoded_minus_what_rounding_dropped(
    codec: tuple[IndexCodec, ValueCodec], numel: int, density: float, seed: int, exponent: int
) -> None:
    nnz = numel if codec[0] == IndexCodec.DENSE else round(density * numel)
    sent = payload_of(*codec, numel, nnz, seed, scale=10.0**exponent)
    header = read_header(sent.data)
    assert (header.nnz, header.numel) == (nnz, numel)
    assert sent.data.numel() == HEADER_BYTES + header.body_bytes <= max_payload_bytes(*codec, nnz, numel)
    indices, values = torch.empty(nnz, dtype=torch.uint32), torch.empty(nnz, dtype=torch.float32)
    decode_body(header, sent.body, indices, values)
    assert torch.equal(indices, sent.indices)
    assert torch.equal(values + sent.error, sent.values)
    largest = float(values.abs().max()) if nnz else 0.0
    assert largest <= largest_value(header, sent.body) * 1.001 <= 1e6 * largest + 1e-30
    if codec[1] == ValueCodec.FP32:
        assert bool((sent.error == 0).all())


@given(codecs, st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 10**6))
def test_any_flipped_bit_in_a_body_is_found_by_its_checksum(
    codec: tuple[IndexCodec, ValueCodec], numel: int, seed: int, bit: int
) -> None:
    sent = payload_of(*codec, numel, numel if codec[0] == IndexCodec.DENSE else -(-numel // 3), seed)
    sent.body[bit // 8 % sent.body.numel()] ^= 1 << bit % 8
    with pytest.raises(WireError, match="body_crc") as caught:
        check_body(sent.header, sent.body)
    assert (caught.value.rank, caught.value.bucket) == (1, 3)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_body_of_another_length_is_refused(change: int) -> None:
    sent = payload_of(IndexCodec.RAW, ValueCodec.FP32, 100, 5, 0)
    body = torch.zeros(sent.body.numel() + change, dtype=torch.uint8)
    with pytest.raises(WireError, match=f"from rank 1 for bucket 3: length = {body.numel()}"):
        check_body(sent.header, body)


def test_a_decoding_error_names_sender_and_bucket() -> None:
    sent = payload_of(IndexCodec.RAW, ValueCodec.FP32, 100, 5, 0)
    lie = replace(sent.header, numel=int(sent.indices[-1]))
    with pytest.raises(WireError, match="from rank 1 for bucket 3: indices") as caught:
        decode_body(lie, sent.body, torch.empty(5, dtype=torch.uint32), torch.empty(5, dtype=torch.float32))
    assert caught.value.value == int(sent.indices[-1])


@pytest.mark.parametrize(
    ("nnz", "numel", "codec"),
    [
        (10, 10, IndexCodec.DENSE),
        (1, 10**6, IndexCodec.RICE),
        (0, 10**6, IndexCodec.RICE),
        (450, 1000, IndexCodec.BITMAP),
    ],
)
def test_auto_takes_the_smallest_index_codec(nnz: int, numel: int, codec: IndexCodec) -> None:
    assert choose_index_codec(nnz, numel) == codec


@given(st.integers(1, 3000), st.floats(0.0005, 0.9), st.integers(0, 1000))
def test_auto_is_close_to_the_best_for_uniform_positions(numel: int, density: float, seed: int) -> None:
    nnz = max(1, round(density * numel))
    chosen = payload_of(choose_index_codec(nnz, numel), ValueCodec.FP32, numel, nnz, seed).header.index_bytes
    for codec in (IndexCodec.RAW, IndexCodec.BITPACK, IndexCodec.RICE, IndexCodec.BITMAP):
        assert chosen <= 1.15 * payload_of(codec, ValueCodec.FP32, numel, nnz, seed).header.index_bytes + 4


@pytest.mark.parametrize("message", ["", "plain", "é" * MAX_ERROR_BYTES, "x" * 10 * MAX_ERROR_BYTES, "\ud800 lone"])
def test_error_payloads_carry_as_much_of_the_message_as_fits(message: str) -> None:
    out = torch.zeros(HEADER_BYTES + MAX_ERROR_BYTES, dtype=torch.uint8)
    encode_error(blank_header(1, 2, 3, 7, 10, method_named("dense").number), message, out)
    done = read_header(out)
    assert (done.rank, done.world, done.bucket, done.step, done.numel) == (1, 2, 3, 7, 10)
    assert done.flags == FLAG_ERROR
    assert done.value_bytes <= MAX_ERROR_BYTES
    body = out[HEADER_BYTES : HEADER_BYTES + done.body_bytes]
    check_body(done, body)
    assert bytes(body.numpy()) == message.encode("utf-8", "replace")[:MAX_ERROR_BYTES]


def test_the_worked_payload_is_the_documents() -> None:
    document = (ROOT / "docs" / "wire-format.md").read_text()
    block = document.split("## A worked payload", 1)[1].split("```\n")[1]
    assert worked_example() == block.rstrip("\n")
    hexadecimal = re.sub(r"^ *\d+  ", "", block, flags=re.MULTILINE)
    data = torch.tensor(list(bytes.fromhex(hexadecimal)), dtype=torch.uint8)
    header = read_header(data)
    indices, values = torch.empty(2, dtype=torch.uint32), torch.empty(2, dtype=torch.float32)
    decode_body(header, data[HEADER_BYTES:], indices, values)
    assert (header.rank, header.world, header.step, header.bucket, header.numel) == (1, 2, 7, 3, 10)
    assert (indices.tolist(), values.tolist()) == ([2, 9], [1.5, -0.25])


def test_the_documents_command_prints_the_worked_payload() -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "docs" / "worked_example.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    assert done.stdout.rstrip("\n") == f"{worked_example()}\n\n{worked_part()}"


def test_the_documents_table_is_the_struct() -> None:
    document = (ROOT / "docs" / "wire-format.md").read_text()
    table = document.split("## Header", 1)[1].split("The header travels", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\w ]+) \|", table, flags=re.MULTILINE)
    offset = 0
    for row_offset, size, _ in rows:
        assert int(row_offset) == offset
        offset += int(size)
    assert offset == HEADER_BYTES == 88
    assert f"{HEADER_BYTES} bytes" in document
