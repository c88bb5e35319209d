"""The registry of exchange methods: each is complete, documented, and right in a simulated world of any size.

A toy method, defined here and so outside the package, goes through the same.
"""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from helpers import ROOT, Cluster, assert_conserved, gradient, plan
from typing_extensions import override

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.collectives import allgather
from sparsecomm.errors import ConfigError
from sparsecomm.exchange import method as registry
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.auto.predict import candidates
from sparsecomm.exchange.costs import Costs
from sparsecomm.exchange.method import Method, Scope, method_named, methods, register
from sparsecomm.feedback import SelectedTaken
from sparsecomm.tools.benches.compressors import compressor_for
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Pairs, Sizes, ValueCodec
from sparsecomm.wire import header as headers

N = 240
COSTS = Costs(1e-4, 8e-9, 1e-4, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9)


class Toy(Method):
    """Sends each selection as raw numbers: k positions, then k values, padded with zeros at position 0."""

    name = "toy"
    number = 200
    has_body = False
    must_match: ClassVar = {"nnz": "k"}
    scope = Scope.COMPARISON

    _taken: SelectedTaken
    _parts: list[Pairs]

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        return (sizes.ranks - 1) * (headers.HEADER_BYTES + 8 * sizes.k + 4)

    @override
    def take(self) -> SelectedTaken:
        self._taken = self.exchange.take_some()
        return self._taken

    @override
    def encode(self) -> None:
        self.header = self.exchange.header()
        self.header.nnz = self.exchange.plan.k
        self.make_bare_payload()

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        exchange, taken, k = self.exchange, self._taken, self.exchange.plan.k
        mine = torch.zeros(2 * k + 1, dtype=torch.float32)
        mine[0] = taken.nnz
        mine[1 : 1 + taken.nnz] = taken.indices.to(torch.int64).float()
        mine[1 + k : 1 + k + taken.nnz] = taken.values
        blocks = [mine.view(torch.uint8)]
        if exchange.channel.size > 1:
            blocks = yield from allgather(exchange.channel, blocks[0], exchange.arena, "toy")
        self._parts = []
        for block in blocks:
            numbers = block.clone().view(torch.float32)
            nnz = int(numbers[0])
            self._parts.append((numbers[1 : 1 + nnz].to(torch.int64).to(torch.uint32), numbers[1 + k : 1 + k + nnz]))
        return True

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        kernels.scatter_reduce(out, self._parts, scale=scale)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    """The toy among the registered methods, for one test."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setattr(headers, "_RULES", dict(headers._RULES))
    return register(Toy)


NAMES = [*methods(), "toy"]


def test_numbers_and_names_are_unique_and_fit_into_a_header() -> None:
    found = methods()
    assert len(found) >= 11
    assert len({m.number for m in found.values()}) == len(found)
    assert all(0 < m.number < 256 and m.name == name for name, m in found.items())
    assert {m.number for m in found.values()} <= {rules.number for rules in headers.known_rules()}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "toy"])
def test_every_method_has_a_row_in_the_document(name: str) -> None:
    text = (ROOT / "docs" / "collectives.md").read_text()
    assert re.search(rf"^\|[^\n]*`\"?{name}\"?`", text, flags=re.MULTILINE), (
        f"docs/collectives.md has no row for {name}"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 5, 64])
def test_every_method_predicts_bytes_and_seconds(name: str, ranks: int) -> None:
    sizes = Sizes(k=10_000, numel=1_000_000, ranks=ranks, values=ValueCodec.FP16)
    sent, estimate = method_named(name).bytes_sent(sizes), method_named(name).seconds(sizes, COSTS)
    assert sent >= 0
    assert (sent > 0) == (ranks > 1)
    assert estimate.seconds == estimate.link + estimate.compute > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_method_conserves_and_gives_all_ranks_the_same_bits(name: str, size: int) -> None:
    compressor = compressor_for(name, 0.1)
    cluster = Cluster(size, N, nodes=[r // 2 for r in range(size)])
    for step in range(3):
        grads = [gradient("normal", N, torch.float32, 10 * step + r) for r in range(size)]
        before, given = [r.clone() for r in cluster.residuals], [g.clone() for g in grads]
        cluster.step(grads, plan(N, compressor=compressor, collective=name, step=step))
        assert all(torch.equal(g.view(torch.int32), grads[0].view(torch.int32)) for g in grads)
        assert_conserved(given, before, grads[0], cluster.residuals)


def test_a_method_from_outside_is_an_option_like_any_other() -> None:
    config = sc.SparseConfig(compressor=sc.TopK(0.1), collective="toy")
    assert config.method == "toy"
    assert "toy" not in {c.method for c in candidates(config, layered=True)}, "it is for comparison"


def test_a_method_that_is_not_complete_or_takes_anothers_place_is_refused() -> None:
    class Nameless(Toy):
        number = 201

    class Taken(Toy):
        name = "another"

    class Wide(Toy):
        name = "wide"
        number = 256

    for wrong, word in ((Nameless, "toy"), (Taken, "200"), (Wide, "256")):
        with pytest.raises(ConfigError, match=word):
            register(wrong)
    assert set(methods()) == set(NAMES)
