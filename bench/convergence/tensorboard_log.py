"""Scalars for TensorBoard: losses, the bytes and seconds of communication, and the signs of `state.convergence()`."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from run_log import Row

import sparsecomm as sc

__all__ = ["Scalars"]


class Scalars:
    """Writes one point per step; does nothing without a folder.

    Args:
        folder: Log folder of TensorBoard, or None.
        state: State of the run, or None for plain DDP.
    """

    def __init__(self, folder: str | None, state: sc.SparseState | None) -> None:
        self._state = state
        self._writer: Any = None
        if folder:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder)

    def add(self, row: Row) -> None:
        """Adds the points of one row."""
        if self._writer is None:
            return
        points = {"loss/train": row.train_loss, "loss/validation": row.val_loss, "communication/ratio": row.ratio}
        if self._state is not None:
            last = self._state.last_step()
            points |= {
                "communication/bytes_sent": last.bytes_sent,
                "communication/nonzeros": last.nnz,
                "communication/density": last.density,
                "communication/residual_norm": self._state.residual_norm(),
                "seconds/select": last.select_seconds,
                "seconds/encode": last.encode_seconds,
                "seconds/wait": last.wait_seconds,
                "seconds/apply": last.apply_seconds,
                "seconds/communication": last.communication_seconds,
                "seconds/exposed": last.exposed_seconds,
            }
            found = self._state.convergence()
            if found is not None:
                points |= {f"convergence/{name}": value for name, value in asdict(found).items()}
        for name, value in points.items():
            if value is not None and not math.isnan(value):
                self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Writes pending points and closes the file."""
        if self._writer is not None:
            self._writer.close()
