"""The log of a training run: one JSON file of settings and rows, and the picture drawn from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

LABELS = {
    "none": "dense fp32 (plain DDP)",
    "dense": "dense (through sparsecomm)",
    "fp16": "fp16 (torch's hook)",
    "powersgd-r4": "PowerSGD rank 4 (torch's hook)",
    "powersgd-r1": "PowerSGD rank 1 (torch's hook)",
    "silent": "no exchange (a hook that sends nothing)",
}


class LogError(ValueError):
    """A log cannot be read or used; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step.

    Attributes:
        step: Number of updates done; row 0 is the model before training.
        train_loss: Loss of the batch before this update, in the log's ``loss_unit``: rank 0's, or the mean of all ranks
            with ``--global-batch``. None in row 0.
        val_loss: Loss of the fixed held-out batches after this update; None if it was not measured. The log's
            ``judge`` says whether they are validation or test data.
        seconds: Cumulative training time on rank 0, without evaluation, checkpoints and start-up.
        bytes_sent: Cumulative gradient bytes that this rank put on the wire, headers included.
        ratio: Bytes that an fp32 ring allreduce sends in a step, over the bytes sent in this one; None in row 0.
        val_accuracy: Share of the held-out examples classified correctly; None if that is not measured.
    """

    step: int
    train_loss: float | None
    val_loss: float | None
    seconds: float
    bytes_sent: int
    ratio: float | None
    val_accuracy: float | None = None


@dataclass(frozen=True)
class RunLog:
    """Settings and rows of one run. ``rows`` grows by one per step."""

    meta: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Short name of the run for tables and legends."""
        compressor = str(self.meta["compressor"])
        if compressor in LABELS:
            return LABELS[compressor]
        return f"{compressor} {float(self.meta['density']):.3g}".replace("topk", "top-k")

    @property
    def loss_name(self) -> str:
        """Name of ``val_loss``, with its unit."""
        return f"{self.meta.get('judge', 'validation')} loss ({self.meta.get('loss_unit', 'nats per byte')})"

    def evaluated(self) -> list[tuple[Row, float]]:
        """Returns the rows that have a validation loss, each with that loss."""
        return [(row, row.val_loss) for row in self.rows if row.val_loss is not None]

    def write(self, path: Path) -> None:
        """Writes the JSON file, whole or not at all."""
        text = json.dumps({"meta": self.meta, "rows": [asdict(row) for row in self.rows]}, indent=1)
        replace_file(path, (text + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Reads a file that ``write`` wrote.

        Raises:
            LogError: The file is missing, or is not a log.
        """
        try:
            document = json.loads(path.read_text())
            names = {f.name for f in fields(Row)}
            rows = [Row(**{k: v for k, v in row.items() if k in names}) for row in document["rows"]]
            return cls(dict(document["meta"]), rows)
        except OSError as error:
            raise LogError(f"cannot read the log {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LogError(f"{path} is not a log of a training run: {error!r}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes to a temporary file in the same folder and renames it, so that a reader never sees half of the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def plot(logs: Sequence[RunLog], path: Path) -> tuple[Path, Path]:
    """Draws validation loss against steps, bytes sent (log scale) and training time.

    Args:
        logs: Runs to draw, one curve each.
        path: Path of the PNG. An SVG of the same name is written next to it.

    Returns:
        Paths of the PNG and of the SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), sharey=True, layout="constrained")
    titles = ("at equal steps", "at equal bytes", "at equal time")
    labels = ("step", "bytes sent per rank (MB, log scale)", "training time (s)")
    for axis, title, label in zip(axes, titles, labels, strict=True):
        axis.set(title=title, xlabel=label)
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_ylabel(" and ".join(sorted({log.loss_name for log in logs})))
    axes[1].set_xscale("log")
    for log, colour, marker in zip(logs, ("#4c4c4c", "#d1495b", "#00798c", "#edae49"), "os^D", strict=False):
        points = log.evaluated()
        losses = [loss for _, loss in points]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3.5, "label": log.label}
        axes[0].plot([row.step for row, _ in points], losses, **style)
        sent = [(row.bytes_sent / 1e6, loss) for row, loss in points if row.bytes_sent > 0]
        axes[1].plot([x for x, _ in sent], [y for _, y in sent], **style)
        axes[2].plot([row.seconds for row, _ in points], losses, **style)
    axes[0].legend(frameon=False)
    vector = path.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    figure.savefig(vector)
    plt.close(figure)
    return path, vector
