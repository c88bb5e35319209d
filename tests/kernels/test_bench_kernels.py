"""The benches run at a small size and give the rows that are documented."""

from __future__ import annotations

from sparsecomm.benches import kernels as kernel_bench
from sparsecomm.benches import wire as wire_bench


def test_kernel_rows() -> None:
    result = kernel_bench.run(numel=200_000, densities=(0.01,), repeats=2)
    assert {"cpu", "torch", "date"} <= set(result["meta"])
    ops = {row["op"] for row in result["rows"]}
    assert ops == {"accumulate_select", "exact_topk", "encode", "decode_add"}
    for row in result["rows"]:
        assert {"op", "path", "density", "numel", "seconds"} <= set(row)
        assert row["seconds"] > 0
    kernel_bench.print_table(result)


def test_wire_rows() -> None:
    result = wire_bench.run(numel=200_000, densities=(0.01,), repeats=2)
    rice = next(r for r in result["rows"] if str(r.get("index_codec")).lower() == "rice")
    assert rice["index_bits"] <= 1.06 * rice["entropy_bits"]
    assert any("value_bits" in r for r in result["rows"])
    wire_bench.print_table(result)
