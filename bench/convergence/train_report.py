"""Progress of a training run on rank 0: a bar on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

import math
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from run_log import Row

import sparsecomm as sc
from sparsecomm.tools.cli.output import on_terminal

SMOOTHED = 20  # number of steps over which the loss and the speed are averaged


class Report:
    """Shows rows as they are made; does nothing on ranks other than 0."""

    def __init__(self, *, rank: int, steps: int, items_per_step: int, items: str, progress: str) -> None:
        """Prepares the bar.

        Args:
            rank: This rank.
            steps: Length of the bar.
            items_per_step: Number of items from which all ranks together learn in a step.
            items: Name of the items, in the plural.
            progress: "on" always draws the bar, "auto" only on a terminal, "off" never.
        """
        self._speaks = rank == 0
        self._items, self._name = items_per_step, items
        self._steps = steps
        bar = self._speaks and (progress == "on" or (progress == "auto" and on_terminal()))
        self._console = Console(force_terminal=bar, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if bar:
            text = TextColumn("loss {task.fields[loss]}  {task.fields[speed]}  {task.fields[ratio]}")
            columns = (
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(24),
                text,
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=steps, loss="-", speed="", ratio="")

    def __enter__(self) -> Report:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints one line, above the bar if it is shown."""
        if self._speaks:
            self._console.print(line, markup=False, soft_wrap=True)

    def show(self, rows: list[Row], state: sc.SparseState | None = None) -> None:
        """Shows the newest row and, beside an evaluation, signs that the state's compression slows convergence."""
        if not self._speaks:
            return
        row = rows[-1]
        recent = rows[-SMOOTHED - 1 :]
        losses = [r.train_loss for r in recent if r.train_loss is not None]
        loss = f"{sum(losses) / len(losses):.3f}" if losses else "-"
        elapsed = recent[-1].seconds - recent[0].seconds
        speed = f"{(len(recent) - 1) * self._items / elapsed:,.0f} {self._name}/s" if elapsed > 0 else ""
        ratio = f"{row.ratio:.1f}x smaller" if row.ratio is not None else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=row.step, loss=loss, speed=speed, ratio=ratio)
        elif row.val_loss is not None:
            accuracy = f" ({row.val_accuracy:.2%} right)" if row.val_accuracy is not None else ""
            self.say(
                f"step {row.step:5d}/{self._steps}  held out {row.val_loss:.4f}{accuracy}  training {loss}  "
                f"{speed}  {row.bytes_sent / 1e6:.2f} MB sent  {ratio}{_signs(state)}"
            )


def _signs(state: sc.SparseState | None) -> str:
    """Returns the figures of `SparseState.convergence` in a few words, or nothing."""
    found = None if state is None else state.convergence()
    if found is None:
        return ""
    waiting = "" if math.isnan(found.mean_age) else f", wait {found.mean_age:.0f}, never {found.never_sent:.0%}"
    return f"  residual {found.residual_ratio:.1f}{waiting}"
