"""Whole bodies on every path, damaged or not: the same bytes, pairs and errors as the reference."""

from __future__ import annotations

import random

import pytest
import torch
from by_path import by_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_cases import Said, payload
from vectors import same_bits, seeds

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import IndexCodec, ValueCodec

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def decoded(said: Said, body: torch.Tensor, positions: torch.Tensor | None) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Returns the error of decoding a payload, if any, and the pairs."""
    indices, values = torch.zeros(said.nnz, dtype=torch.uint32), torch.zeros(said.nnz, dtype=torch.float32)
    try:
        kernels.decode_pairs([said], [body], indices, values, known=None if positions is None else (0, positions))
    except WireError as error:
        return str(error), torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.float32)
    return "", indices.to(torch.int64), values


@many
@given(
    codecs=st.tuples(st.sampled_from(IndexCodec), st.sampled_from(ValueCodec)),
    nnz=st.sampled_from([0, 1, 5, 130]),
    seed=seeds,
    damage=st.integers(0, 4),
    known=st.booleans(),
)
def test_damaged_payloads_are_refused_in_the_references_words(
    path: str, codecs: tuple[IndexCodec, ValueCodec], nnz: int, seed: int, damage: int, known: bool
) -> None:
    rng = random.Random(seed)
    said, body = payload(seed % 7, *codecs, nnz, 400)
    if damage == 1 and body.numel():
        body[rng.randrange(body.numel())] ^= 1 << rng.randrange(8)
    elif damage == 2:
        body = body[: rng.randrange(body.numel() + 1)]
    elif damage == 3:
        body = torch.cat([torch.tensor([rng.randrange(256)], dtype=torch.uint8), body])
        said.index_bytes += rng.randrange(2)
    elif damage == 4:
        said.index_bytes = rng.randrange(body.numel() + 9)
    positions = torch.arange(said.nnz, dtype=torch.int64).to(torch.uint32) if known else None
    mine = decoded(said, body, positions)
    truth = by_reference(path, lambda: decoded(said, body, positions))
    assert mine[0] == truth[0]
    assert torch.equal(mine[1], truth[1])
    assert same_bits(mine[2], truth[2])
    assert damage or not mine[0]


@pytest.mark.parametrize("index_codec", list(IndexCodec))
def test_no_pairs_are_no_excuse_for_bytes(path: str, index_codec: IndexCodec) -> None:
    """An empty output has address 0, which must not be taken for known positions."""
    said = Said(0, index_codec, ValueCodec.FP32, 0, 16)
    said.index_bytes = 5
    with pytest.raises(WireError):
        kernels.decode_pairs(
            [said],
            [torch.full((5,), 255, dtype=torch.uint8)],
            torch.empty(0, dtype=torch.float32).to(torch.uint32),
            torch.empty(0, dtype=torch.float32),
        )
