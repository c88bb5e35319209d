"""Admission of workers: all must have the model, the initial values and the mode of the first one that said HELLO."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.rules import Rules

__all__ = ["Admission", "Hello"]

HELLO_FIELDS: dict[str, type] = {"model": list, "values": str, "shards": int, "mode": str}


@dataclass(frozen=True)
class Hello:
    """The content of a HELLO.

    Attributes:
        worker: Rank of its sender.
        layout: Layout of the worker's model.
        values: Hash of the worker's initial values.
    """

    worker: int
    layout: ModelLayout
    values: str


class Admission:
    """Compares each HELLO with the first one.

    Args:
        rules: Rules of the job.
        shards: Number of shards.

    Attributes:
        first: The first HELLO; None before there was one.
    """

    def __init__(self, rules: Rules, shards: int) -> None:
        self.first: Hello | None = None
        self._rules = rules
        self._shards = shards

    def check(self, worker: int, body: torch.Tensor, *, joins: bool) -> Hello:
        """Reads a HELLO and returns the first one.

        Args:
            worker: Rank of the sender.
            body: Body of the HELLO.
            joins: Whether the worker came after the start. It gets the job's values, so its initial ones may differ.

        Raises:
            WireError: If something differs. It names the difference and the worker.
        """
        said = ms.read_json(body, HELLO_FIELDS, worker)
        hello = Hello(worker, ModelLayout.from_json(said["model"], worker), said["values"])
        text = f"{said['mode']}, {said['shards']} servers"
        expected = f"{self._rules.mode}, {self._shards} servers"
        if text != expected:
            raise WireError("job", text, f"this server runs {expected}", rank=worker)
        first = self.first or hello
        if hello.layout != first.layout:
            reason = f"as worker rank {first.worker} has it"
            raise WireError("model", first.layout.difference(hello.layout), reason, rank=worker)
        if hello.values != first.values and not joins:
            reason = f"rank {first.worker} starts from others; build the model from the same seed on every worker"
            raise WireError("initial values", hello.values, reason, rank=worker)
        return first
