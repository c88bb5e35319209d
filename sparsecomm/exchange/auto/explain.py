"""The chooser's reasons as a table of plain text."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from sparsecomm.exchange.costs import Costs

if TYPE_CHECKING:
    from sparsecomm.exchange.auto.chooser import Chooser

__all__ = ["explain"]


def explain(chooser: Chooser) -> str:
    """Returns what was measured, predicted and decided, in lines of at most 100 characters."""
    costs = chooser.costs
    if costs is None:
        return f"auto: nothing is measured yet ({chooser.size} ranks); by bytes alone until then"
    lines = [
        f"auto, {chooser.size} ranks. Measured, the slowest rank's: {costs.alpha * 1e6:.0f} us a round of messages, "
        f"{_rate(costs.beta)}, {costs.exchange * 1e6:.0f} us an exchange,",
        f"  ns an element: select {costs.select * 1e9:.2f}, fill {costs.fill * 1e9:.2f}, add {costs.add * 1e9:.2f}; "
        f"ns a nonzero: encode {costs.encode * 1e9:.2f}, decode {costs.decode * 1e9:.2f}",
        *_nodes(costs),
        "",
        f"{'bucket':>6} {'elements':>12}  {'candidate':<16} {'link ms':>9} {'compute ms':>10} {'predicted ms':>12} "
        f"{'measured ms':>11}",
    ]
    for index, row in sorted(chooser.table.items()):
        numel = chooser.numel_of(index)
        for candidate, e in sorted(row.items(), key=lambda item: item[1].seconds):
            samples = list(chooser.measured.get((index, candidate), ()))
            seen = f"{median(samples) * 1e3:.3f}" if samples else "-"
            mark = " <" if chooser.chosen is not None and chooser.chosen.of(index) == candidate else ""
            lines.append(
                f"{index:>6} {numel:>12,}  {candidate.name:<16} {e.link * 1e3:>9.3f} {e.compute * 1e3:>10.3f} "
                f"{e.seconds * 1e3:>12.3f} {seen:>11}{mark}"
            )
    return "\n".join([*lines, "", *_options(chooser)])


def _nodes(costs: Costs) -> list[str]:
    if not costs.layered:
        return []
    return [
        f"  {costs.nodes} nodes of at most {costs.beside} ranks; inside one {costs.inner_alpha * 1e6:.0f} us a round, "
        f"{_rate(costs.inner_beta)}"
    ]


def _options(chooser: Chooser) -> list[str]:
    lines = [f"{'option':<24} {'all exchanges, predicted ms':>27} {'whole step, measured ms':>24}"]
    for option in chooser.options:
        seen = "-" if math.isinf(option.measured) else f"{option.measured * 1e3:.3f}"
        mark = " <" if option is chooser.chosen else ""
        lines.append(f"{option.name:<24} {option.predicted * 1e3:>27.3f} {seen:>24}{mark}")
    chosen = chooser.chosen
    if chooser.decided_at is None or chosen is None:
        return [*lines, "trying these in turn; not decided yet"]
    if len(chooser.options) == 1:
        why = "nothing else is predicted to come near it"
    elif chosen is chooser.options[0]:
        why = "predicted to be the fastest, and no other was 2% faster on real steps"
    elif chosen.is_plain and chosen.measured > min(o.measured for o in chooser.options):
        why = "no compression, since nothing was 2% faster on real steps"
    else:
        why = "the fastest on real steps"
    return [*lines, f"chosen at step {chooser.decided_at}: {chosen.name}: {why}"]


def _rate(beta: float) -> str:
    return f"{beta * 1e9:.3f} ns a byte ({8e-9 / beta:.2f} Gbit/s)" if beta > 0 else "no link"
