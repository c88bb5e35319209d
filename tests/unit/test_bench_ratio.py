"""`bench ratio`: bytes are those of real payloads, the contraction is right, recordings come from real training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import KINDS, gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomm import kernels
from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import ratio
from sparsecomm.tools.benches.recordings import SOURCES, missing, record
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, decode_body, read_header


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return ratio.run(models=("text-cnn",), densities=(0.01, 0.1), steps=4, repeats=2)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    numel=st.integers(1, 700),
    share=st.floats(0.01, 1.0),
    value_codec=st.sampled_from(ValueCodec),
    index_codec=st.sampled_from([c for c in IndexCodec if c != IndexCodec.DENSE]),
    seed=st.integers(0, 99),
)
def test_bytes_and_error_are_those_of_the_payload(
    kind: str, numel: int, share: float, value_codec: ValueCodec, index_codec: IndexCodec, seed: int
) -> None:
    x = gradient(kind, numel, torch.float32, seed)
    k = max(1, round(share * numel))
    indices, values = torch.empty(k, dtype=torch.uint32), torch.empty(k, dtype=torch.float32)
    nnz = kernels.exact_topk(None, x.clone(), k, indices, values).stored
    coded = ratio.code(x, indices[:nnz], values[:nnz], value_codec, index_codec)

    header = read_header(coded.payload)
    assert coded.payload.numel() == HEADER_BYTES + coded.index_bytes + coded.value_bytes
    assert (header.index_bytes, header.value_bytes, header.nnz) == (coded.index_bytes, coded.value_bytes, nnz)
    got_indices, got_values = torch.empty(nnz, dtype=torch.uint32), torch.empty(nnz, dtype=torch.float32)
    decode_body(header, coded.payload[HEADER_BYTES:].clone(), got_indices, got_values)
    back = torch.zeros(numel, dtype=torch.float64)
    back[got_indices.long()] = got_values.double()
    lost, whole = float((x.double() - back).norm()), float(x.double().norm())
    assert coded.relative_error * whole == pytest.approx(lost, rel=1e-9, abs=1e-50)
    assert 0.0 <= coded.delta <= 1.0
    if value_codec == ValueCodec.FP32:
        assert coded.delta >= k / numel * (1 - 1e-12)


def test_rows_are_consistent(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert len(rows) == 2 * len(ValueCodec) * (len(IndexCodec) - 1)
    for row in rows:
        size = row["payload_bytes"]
        assert size == pytest.approx(HEADER_BYTES + row["index_bytes"] + row["value_bytes"])
        assert row["ratio_fp32"] == pytest.approx(4 * row["numel"] / size)
        assert row["ratio_coo32"] == pytest.approx(8 * row["nnz"] / size)
        assert row["bits_an_element"] * row["ratio_fp32"] == pytest.approx(32)
        assert 0.0 <= row["delta_worst"] <= row["delta"] <= 1.0
        assert row["ok"] == ("ok" if row["delta_worst"] >= row["delta_bound"] else "MISS")
        assert row["encode_floor_ratio"] > 0
        assert row["decode_floor_ratio"] > 0
    coo = next(r for r in rows if (r["value_codec"], r["index_codec"]) == ("FP32", "RAW"))
    assert coo["payload_bytes"] == HEADER_BYTES + 8 * coo["nnz"]
    assert coo["ratio_coo32"] < 1, "our own header counts"
    assert {row["index_codec"] for row in rows if row["chosen"]} == {"RICE"}


def test_random_k_contracts_by_its_density(result: dict[str, Any]) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    assert ratio._random_k(x, 5_000) == pytest.approx(0.05, rel=0.1)
    assert all(row["delta"] > 2 * row["delta_random"] for row in result["rows"])


def test_the_result_is_shown_and_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    ratio.print_table(result)
    assert {file.suffix for file in ratio.plots(result, tmp_path)} == {".png", ".svg"}
    assert all(file.stat().st_size > 1000 for file in tmp_path.iterdir())


def test_what_is_recorded_first_is_the_gradient_of_the_first_batch() -> None:
    source = SOURCES["gpt"]
    recorded = record(source, 0.01, 1, [1]).accumulated[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = source.build()
    inputs, targets = source.draw(torch.Generator().manual_seed(1), source.batch)
    loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(recorded, by_hand)


def test_error_feedback_is_running_and_recordings_repeat() -> None:
    source = SOURCES["text-cnn"]
    sparse, again, dense = (record(source, d, 4, [1, 4]) for d in (0.01, 0.01, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(sparse.accumulated, again.accumulated, strict=True))
    assert torch.equal(sparse.accumulated[0], dense.accumulated[0])
    # At density 1 the residual is empty; at 1% it still holds nearly all of four gradients.
    assert float(sparse.accumulated[1].norm()) > 1.5 * float(dense.accumulated[1].norm())


def test_training_learns() -> None:
    first, last = record(SOURCES["gpt"], 0.1, 10, [10]).losses
    assert last < first - 0.5


def test_digits_are_trained_or_refused_with_the_reason() -> None:
    source = SOURCES["digits-cnn"]
    if missing(source):
        with pytest.raises(ConfigError, match="sklearn is not installed"):
            ratio.run(models=("digits-cnn",))
        with pytest.raises(ConfigError, match="sklearn is not installed"):
            record(source, 0.1, 1, [1])
    else:
        assert record(source, 0.1, 1, [1]).accumulated[0].abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("resnet",)}, "'resnet' does not exist; known are gpt"),
        ({"densities": (0.0,)}, "density = 0.0"),
        ({"densities": (1.5,)}, "density = 1.5"),
        ({"steps": 0}, "steps = 0"),
        ({"repeats": -1}, "repeats = -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ratio.run(**options)
