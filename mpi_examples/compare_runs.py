"""Compare two logs of train_gpt.py, a dense run and a compressed one: a table, a verdict, a picture.

python mpi_examples/compare_runs.py dense.json topk.json --plot compare.png
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
from run_log import LogError, RunLog, plot


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run in numbers.

    Attributes:
        label: The run's name.
        val_loss: At its last evaluation, nats per byte.
        step_seconds: Median over its steps, the first left out.
        warmup_bytes: Mean bytes a step on the wire from one rank during density warm-up; None without one.
        bytes_per_step: The same after the warm-up.
        total_bytes: Of all steps, from one rank.
        ratio: fp32 ring allreduce's bytes a step over ``bytes_per_step``; None where nothing is sent.
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
    """Validation loss of both runs at one equal point.

    Attributes:
        at: What is equal, in words.
        dense: The dense run's loss there.
        sparse: The compressed run's.
        note: What a reader must know to judge the numbers.
    """

    at: str
    dense: float
    sparse: float
    note: str


def summarise(log: RunLog) -> Summary:
    """Reduce a run to its numbers.

    Raises:
        LogError: The run has no step, or no evaluation.
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
    """Both at the last step that both evaluated."""
    ours = {row.step: loss for row, loss in sparse.evaluated()}
    theirs = {row.step: loss for row, loss in dense.evaluated()}
    step = max(ours.keys() & theirs.keys(), default=None)
    if step is None:
        raise LogError("the two runs evaluated no step in common")
    gap = ours[step] / theirs[step] - 1.0
    word = "higher" if gap > 0 else "lower"
    return Verdict(
        at=f"equal steps: {step}",
        dense=theirs[step],
        sparse=ours[step],
        note=f"compressed is {abs(gap):.1%} {word}",
    )


def at_equal_bytes(dense: RunLog, sparse: RunLog) -> Verdict:
    """The compressed run at its end, the dense one when it had sent as many bytes.

    Dense is given the benefit of the doubt: its first evaluation at or beyond that many bytes counts.
    """
    last, ours = sparse.evaluated()[-1]
    budget = last.bytes_sent
    reached = [(row, loss) for row, loss in dense.evaluated() if row.bytes_sent >= budget]
    row, theirs = reached[0] if reached else dense.evaluated()[-1]
    note = f"dense is at step {row.step} there ({row.bytes_sent / 1e6:.1f} MB)"
    if not reached:
        note += ": it never sent as many"
    elif dense.rows[1].bytes_sent > budget:
        note += ": it had not even finished its first step"
    return Verdict(at=f"equal bytes: {budget / 1e6:.1f} MB per rank", dense=theirs, sparse=ours, note=note)


def at_equal_time(dense: RunLog, sparse: RunLog) -> Verdict:
    """Both when the quicker one ended, between evaluations by straight lines."""
    seconds = min(log.evaluated()[-1][0].seconds for log in (dense, sparse))
    theirs, ours = (_loss_at(log, seconds) for log in (dense, sparse))
    slower = summarise(sparse).step_seconds / summarise(dense).step_seconds
    return Verdict(
        at=f"equal time: {seconds:.1f} s",
        dense=theirs,
        sparse=ours,
        note=f"a compressed step takes {slower:.2f}x a dense one on this machine",
    )


def _loss_at(log: RunLog, seconds: float) -> float:
    points = [(row.seconds, loss) for row, loss in log.evaluated()]
    for (t0, a), (t1, b) in pairwise(points):
        if t0 <= seconds <= t1:
            return a + (b - a) * (seconds - t0) / (t1 - t0) if t1 > t0 else b
    return points[-1][1] if seconds > points[-1][0] else points[0][1]


def tables(dense: RunLog, sparse: RunLog) -> tuple[Table, Table]:
    """The runs side by side, and their losses at equal steps, bytes and time."""
    runs = Table(title="The same training twice")
    headings = ("run", "validation\nloss", "step time\n(median)", "bytes a step\nin warm-up")
    for heading in (*headings, "bytes a step\nafter", "total\nsent", "smaller than\nfp32 dense"):
        runs.add_column(heading, justify="left" if heading == "run" else "right")
    for summary in (summarise(dense), summarise(sparse)):
        runs.add_row(
            summary.label,
            f"{summary.val_loss:.4f}",
            f"{summary.step_seconds * 1e3:.0f} ms",
            "-" if summary.warmup_bytes is None else f"{summary.warmup_bytes:,.0f}",
            f"{summary.bytes_per_step:,.0f}",
            f"{summary.total_bytes / 1e6:,.1f} MB",
            "-" if summary.ratio is None else f"{summary.ratio:.1f}x",
        )
    losses = Table(title="Validation loss (nats per byte, lower is better)")
    for heading in ("at", "dense", "compressed", "note"):
        losses.add_column(heading, justify="right" if heading in ("dense", "compressed") else "left")
    for verdict in (f(dense, sparse) for f in (at_equal_steps, at_equal_bytes, at_equal_time)):
        losses.add_row(verdict.at, f"{verdict.dense:.4f}", f"{verdict.sparse:.4f}", verdict.note)
    return runs, losses


def show(dense: RunLog, sparse: RunLog, console: Console) -> None:
    """Print both tables, and what the bytes are."""
    for table in tables(dense, sparse):
        console.print(table)
    ranks, parameters = dense.meta["world_size"], dense.meta["parameters"]
    console.print(
        f"{parameters:,} parameters, {ranks} ranks on this machine. Bytes are what one rank sends: "
        f"{dense.meta['bytes_are']} for the dense run, {sparse.meta['bytes_are']} for the compressed one, "
        "headers included. Ranks on one machine talk through memory, so compression saves them no time; "
        "the bytes are what a network between machines would carry.",
        highlight=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="log of the dense run")
    parser.add_argument("sparse", type=Path, help="log of the compressed run")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw both (an SVG goes beside it)")
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
