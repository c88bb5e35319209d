"""Admission of workers: all must have the model, the initial values and the mode of the first one that said HELLO."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import ENVELOPE_BYTES, LONGEST_REQUEST, MAX_MESSAGE, Kind
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.rules import Rules
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import max_payload_bytes

__all__ = ["Admission", "Hello"]

_DIFFERENCE = 4096  # bytes that a HELLO may be longer than the first, so that most errors name the parameter
HELLO_FIELDS: dict[str, type] = {"model": list, "values": str, "shards": int, "mode": str}


@dataclass(frozen=True)
class Hello:
    """The content of a HELLO.

    Attributes:
        worker: Rank of its sender.
        layout: Layout of the worker's model.
        values: Hash of the worker's initial values.
        nbytes: Length of the HELLO's body.
    """

    worker: int
    layout: ModelLayout
    values: str
    nbytes: int


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

    @property
    def longest_payload(self) -> int:
        """Most bytes in the body of a PUSH or INIT."""
        if self.first is None:
            return MAX_MESSAGE - 2 * ENVELOPE_BYTES  # it must fit into an EVENT, too
        return _longest_payload(-(-self.first.layout.numel // self._shards))

    def check(self, worker: int, body: torch.Tensor, *, joins: bool) -> Hello:
        """Reads a HELLO and returns the first one.

        Args:
            worker: Rank of the sender.
            body: Body of the HELLO.
            joins: Whether the worker came after the start. It gets the job's values, so its initial ones may differ.

        Raises:
            WireError: If something differs. It names the difference and the worker.
        """
        longest = LONGEST_REQUEST[Kind.HELLO] if self.first is None else self.first.nbytes + _DIFFERENCE
        if body.numel() > longest:  # JSON takes many times its length when it is read
            raise WireError("body_bytes", body.numel(), f"a HELLO of this job has up to {longest}", rank=worker)
        said = ms.read_json(body, HELLO_FIELDS, worker)
        hello = Hello(worker, ModelLayout.from_json(said["model"], worker), said["values"], body.numel())
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


@cache
def _longest_payload(numel: int) -> int:
    """Returns the most bytes of a payload and its marks for a shard of `numel` elements."""
    return max(max_payload_bytes(codec, ValueCodec.FP32, numel, numel) for codec in IndexCodec) + numel // 8 + 1
