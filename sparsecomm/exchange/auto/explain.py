"""The reasons of `collective="auto"` as a table of plain text."""

from __future__ import annotations

import math

from sparsecomm.exchange.auto.report import BucketRows, ChooserReport
from sparsecomm.exchange.costs import Costs

__all__ = ["explain"]


def explain(report: ChooserReport) -> str:
    """Returns the measurements, predictions and decision as lines of at most 100 characters."""
    costs = report.costs
    if costs is None:
        return f"auto: nothing is measured yet ({report.ranks} ranks); by bytes alone until then"
    lines = [
        f"auto, {report.ranks} ranks. Measured, the slowest rank's: {costs.alpha * 1e6:.0f} us a round of messages, "
        f"{_rate(costs.beta)}, {costs.exchange * 1e6:.0f} us an exchange,",
        f"  ns an element: select {costs.select * 1e9:.2f}, fill {costs.fill * 1e9:.2f}, add {costs.add * 1e9:.2f}; "
        f"ns a nonzero: encode {costs.encode * 1e9:.2f}, decode {costs.decode * 1e9:.2f}",
        *_nodes(costs),
        "",
        f"{'bucket':>6} {'elements':>12}  {'candidate':<16} {'link ms':>9} {'compute ms':>10} {'predicted ms':>12} "
        f"{'measured ms':>11}",
    ]
    for bucket in report.buckets:
        lines += _bucket(bucket)
    return "\n".join([*lines, "", *_options(report)])


def _nodes(costs: Costs) -> list[str]:
    if not costs.layered:
        return []
    return [
        f"  {costs.nodes} nodes of at most {costs.beside} ranks; inside one {costs.inner_alpha * 1e6:.0f} us a round, "
        f"{_rate(costs.inner_beta)}"
    ]


def _bucket(bucket: BucketRows) -> list[str]:
    lines = []
    for c in bucket.candidates:
        seen = "-" if c.measured is None else f"{c.measured * 1e3:.3f}"
        mark = " <" if c.chosen else ""
        lines.append(
            f"{bucket.index:>6} {bucket.numel:>12,}  {c.name:<16} {c.predicted.link * 1e3:>9.3f} "
            f"{c.predicted.compute * 1e3:>10.3f} {c.predicted.seconds * 1e3:>12.3f} {seen:>11}{mark}"
        )
    return lines


def _options(report: ChooserReport) -> list[str]:
    decision = report.decision
    lines = [f"{'option':<24} {'all exchanges, predicted ms':>27} {'whole step, measured ms':>24}"]
    for i, option in enumerate(report.options):
        seen = "-" if math.isinf(option.measured) else f"{option.measured * 1e3:.3f}"
        mark = " <" if decision is not None and decision.option == i else ""
        lines.append(f"{option.name:<24} {option.predicted * 1e3:>27.3f} {seen:>24}{mark}")
    if decision is None:
        return [*lines, "trying these in turn; not decided yet"]
    chosen = report.options[decision.option]
    if len(report.options) == 1:
        why = "nothing else is predicted to come near it"
    elif decision.option == 0:
        why = "predicted to be the fastest, and no other was 2% faster on real steps"
    elif chosen.is_plain and chosen.measured > min(o.measured for o in report.options):
        why = "no compression, since nothing was 2% faster on real steps"
    else:
        why = "the fastest on real steps"
    return [*lines, f"chosen at step {decision.step}: {chosen.name}: {why}"]


def _rate(beta: float) -> str:
    return f"{beta * 1e9:.3f} ns a byte ({8e-9 / beta:.2f} Gbit/s)" if beta > 0 else "no link"
