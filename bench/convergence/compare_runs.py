"""Compare two logs of study_gpt.py, of a dense run and a compressed one, in two tables and a picture.

python bench/convergence/compare_runs.py dense.json topk.json --plot compare.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table
from run_log import LogError, Row, RunLog, plot


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of one run.

    Attributes:
        label: Name of the run.
        val_loss: Loss of the last evaluation, in nats per byte.
        step_seconds: Median seconds of a step, without the first step.
        warmup_bytes: Mean bytes that one rank sends in a step of the density warm-up; None without a warm-up.
        bytes_per_step: Mean bytes that one rank sends in a step after the warm-up.
        total_bytes: Bytes that one rank sends in all steps.
        ratio: Bytes of an fp32 ring allreduce over ``bytes_per_step``; None if nothing is sent.
    """

    label: str
    val_loss: float
    step_seconds: float
    warmup_bytes: float | None
    bytes_per_step: float
    total_bytes: int
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Validation losses of both runs at equal steps, bytes or time.

    Attributes:
        at: The equal quantity, in words.
        dense: Loss of the dense run.
        sparse: Loss of the compressed run.
        note: Facts that a reader needs to judge the numbers.
    """

    at: str
    dense: float
    sparse: float
    note: str


def summarise(log: RunLog) -> Summary:
    """Reduces a run to its numbers.

    Raises:
        LogError: The run has no step or no evaluation.
    """
    rows, points = log.rows, log.evaluated()
    if len(rows) < 2 or not points:
        raise LogError(f"the log of {log.label} holds no evaluated step")
    seconds = [b.seconds - a.seconds for a, b in pairwise(rows)]
    sent = [b.bytes_sent - a.bytes_sent for a, b in pairwise(rows)]
    warmup = min(int(log.meta["warmup_steps"]), len(sent) - 1)
    after = statistics.fmean(sent[warmup:])
    return Summary(
        label=log.label,
        val_loss=points[-1][1],
        step_seconds=statistics.median(seconds[1:] or seconds),
        warmup_bytes=statistics.fmean(sent[:warmup]) if warmup else None,
        bytes_per_step=after,
        total_bytes=rows[-1].bytes_sent,
        ratio=int(log.meta["dense_bytes_per_step"]) / after if after else None,
    )


def at_equal_steps(dense: RunLog, sparse: RunLog) -> Verdict:
    """Compares both runs at the last step that both evaluated."""
    ours = {row.step: loss for row, loss in sparse.evaluated()}
    theirs = {row.step: loss for row, loss in dense.evaluated()}
    step = max(ours.keys() & theirs.keys(), default=None)
    if step is None:
        raise LogError("the two runs evaluated no step in common")
    gap = ours[step] / theirs[step] - 1.0
    word = "higher" if gap > 0 else "lower"
    return Verdict(
        at=f"steps: {step}",
        dense=theirs[step],
        sparse=ours[step],
        note=f"compressed {abs(gap):.1%} {word}",
    )


def having_sent(log: RunLog, budget: int) -> tuple[Row, float]:
    """Returns the first evaluation after at least ``budget`` bytes, or else the last one, and its loss."""
    points = log.evaluated()
    return next((point for point in points if point[0].bytes_sent >= budget), points[-1])


def at_equal_bytes(dense: RunLog, sparse: RunLog) -> Verdict:
    """Compares the end of the compressed run with the dense run after as many bytes.

    The dense run has the benefit of the doubt: its first evaluation after at least as many bytes counts.
    """
    last, ours = sparse.evaluated()[-1]
    budget = last.bytes_sent
    row, theirs = having_sent(dense, budget)
    note = f"dense at step {row.step} ({row.bytes_sent / 1e6:.1f} MB)"
    if row.bytes_sent < budget:
        note += ", never as many"
    elif dense.rows[1].bytes_sent > budget:
        note += ", before its first step was over"
    return Verdict(at=f"bytes: {budget / 1e6:.1f} MB", dense=theirs, sparse=ours, note=note)


def at_equal_time(dense: RunLog, sparse: RunLog) -> Verdict:
    """Compares both runs at the end of the quicker one, by linear interpolation between evaluations."""
    seconds = min(log.evaluated()[-1][0].seconds for log in (dense, sparse))
    theirs, ours = (_loss_at(log, seconds) for log in (dense, sparse))
    slower = summarise(sparse).step_seconds / summarise(dense).step_seconds
    return Verdict(
        at=f"time: {seconds:.1f} s",
        dense=theirs,
        sparse=ours,
        note=f"compressed step takes {slower:.2f}x",
    )


def _loss_at(log: RunLog, seconds: float) -> float:
    points = [(row.seconds, loss) for row, loss in log.evaluated()]
    for (t0, a), (t1, b) in pairwise(points):
        if t0 <= seconds <= t1:
            return a + (b - a) * (seconds - t0) / (t1 - t0) if t1 > t0 else b
    return points[-1][1] if seconds > points[-1][0] else points[0][1]


def tables(dense: RunLog, sparse: RunLog) -> tuple[Table, Table]:
    """Returns the runs side by side, and their losses at equal steps, bytes and time, each within 80 columns."""
    summaries = [summarise(dense), summarise(sparse)]
    runs = Table("", *(s.label for s in summaries), title="The same training twice")
    for column in runs.columns[1:]:
        column.justify = "right"
    warmup = sparse.meta["warmup_steps"]
    runs.add_row("validation loss at the end", *(f"{s.val_loss:.4f}" for s in summaries))
    runs.add_row("step time, median", *(f"{s.step_seconds * 1e3:.0f} ms" for s in summaries))
    runs.add_row(
        f"bytes a step, first {warmup} (warm-up)",
        *("-" if s.warmup_bytes is None else f"{s.warmup_bytes:,.0f}" for s in summaries),
    )
    runs.add_row("bytes a step, after", *(f"{s.bytes_per_step:,.0f}" for s in summaries))
    runs.add_row("bytes in all", *(f"{s.total_bytes:,}" for s in summaries))
    runs.add_row(
        "fewer than fp32 dense, after",
        *("-" if s.ratio is None else f"{s.ratio:.1f}x" for s in summaries),
    )
    losses = Table(title="Validation loss (nats per byte, lower is better)")
    for heading in ("at equal", "dense", "compressed", "note"):
        losses.add_column(heading, justify="right" if heading in ("dense", "compressed") else "left")
    for verdict in (f(dense, sparse) for f in (at_equal_steps, at_equal_bytes, at_equal_time)):
        losses.add_row(verdict.at, f"{verdict.dense:.4f}", f"{verdict.sparse:.4f}", verdict.note)
    return runs, losses


def show(dense: RunLog, sparse: RunLog, console: Console) -> None:
    """Prints both tables and the meaning of the bytes."""
    for table in tables(dense, sparse):
        console.print(table)
    meta = dense.meta
    console.print(
        f"{meta['parameters']:,} parameters, {meta['world_size']} ranks. Bytes are those that one rank sends, "
        f"headers included: {sparse.meta['bytes_are']} for the compressed run, {meta['bytes_are']} for the dense one. "
        "Ranks on one machine talk through memory: this shows traffic, not the speed on a slow network.",
        highlight=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="log of the dense run")
    parser.add_argument("sparse", type=Path, help="log of the compressed run")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw both, also as SVG")
    options = parser.parse_args(arguments)
    try:
        dense, sparse = RunLog.read(options.dense), RunLog.read(options.sparse)
        show(dense, sparse, Console())
    except LogError as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        return 2
    if options.plot:
        print("plots: {} and {}".format(*plot([dense, sparse], options.plot)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
