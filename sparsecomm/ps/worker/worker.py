"""The worker that users make: it pushes compressed gradients and pulls parameters into its model."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any, TypeVar

import torch

from sparsecomm import kernels
from sparsecomm.compress import Compressor
from sparsecomm.errors import ConfigError, LaunchError, RemoteError, StateError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.payloads import PULL, Origin, decode
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.worker.client import Client
from sparsecomm.ps.worker.link import Link, Steps
from sparsecomm.ps.worker.metrics import WorkerMetrics
from sparsecomm.ps.worker.part import Part
from sparsecomm.ps.worker.puller import Puller
from sparsecomm.ps.worker.pusher import Pusher
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.names import named_plainly

__all__ = ["Worker", "current_link", "set_current_link"]

T = TypeVar("T")

_MOST_AHEAD = 1 << 12  # rounds that a new worker leaves out at once

_link: Link | None = None


def set_current_link(link: Link | None) -> None:
    """Sets the link of workers that are made without one. `run` calls this."""
    global _link
    _link = link


def current_link() -> Link:
    """Returns the link of workers that are made without one.

    Raises:
        LaunchError: If this is not called inside the training function of `run`.
    """
    if _link is None:
        raise LaunchError("sparsecomm.ps.Worker works inside the function that is given to sparsecomm.ps.run")
    return _link


class Worker:
    """Trains a model whose parameters are on servers.

    The constructor connects to the servers and fetches the parameters. After each backward pass, `step` pushes the
    gradients and pulls the updated parameters. Every worker must build its model with the same initial values.

    Args:
        model: The model. Its trainable parameters are replaced by the servers' values; buffers stay local.
        compressor: Compressor of pushes, or a whole `SparseConfig`; `TopK(0.01)` if None.
        link: Connection to the servers; the one that `run` made if None.
        overlap: Whether each shard's gradient is sent as soon as backward has computed it, which gains nothing with
            one server. Gradients that change after backward (by clipping, or a second backward) are sent again, and
            after two such steps in a row overlap ends with a warning. Use `no_sync` to accumulate gradients.
        options: Options of `SparseConfig`: feedback, value_codec, index_codec, dense_below (elements of a shard),
            dense_steps.

    Raises:
        ConfigError: If an option or the model is not supported, or there are more servers than elements.
        RemoteError: If a server refuses this worker because its model, initial values or mode differ.

    Attributes:
        rank: Number of this worker, from 0.
        size: Number of workers at the start; of a worker that joined later, the number of all up to this one.
        clock: Pushes done. A worker that joins begins with the clock of the others.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        compressor: Compressor | SparseConfig | None = None,
        *,
        link: Link | None = None,
        overlap: bool = True,
        **options: Any,
    ) -> None:
        self.model = model
        self.link = current_link() if link is None else link
        self.config = SparseConfig.of(compressor, options)
        if self.config.collective != "auto" or self.config.compressor.collectives:
            raise ConfigError(
                f"a worker pushes indices and values: collective={self.config.collective!r} with "
                f"{type(self.config.compressor).__name__} cannot be pushed"
            )
        self.layout = ModelLayout.of(model)
        self.rank, self.size = self.link.place
        self.clock = 0
        self._counted = WorkerMetrics()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._frozen = [(name, p) for name, p in named_plainly(model) if not p.requires_grad]
        self._arena = Arena()
        self._flat = torch.cat([p.detach().reshape(-1).to(torch.float32) for p in self._parameters])
        shards = len(self.link.servers)
        sender = (self.link.mailbox.rank, max(self.link.world, self.link.mailbox.rank + 1))
        share = 1.0 / (self.layout.numel * self.size)
        specs = [self.layout.shard(i, shards) for i in range(shards)]
        self._parts = [Part(spec, self.config, sender, clip=share * spec.numel, arena=self._arena) for spec in specs]
        self._client = Client(self.link)
        self._pusher = Pusher(self._client, self._parts, self._named(), self._arena, self._counted)
        self._puller = Puller(self._client, self._parts, self._flat, self._counted)
        if overlap and shards > 1:
            self._pusher.watch(lambda: self.clock)
        self._client.on_answer = {
            Kind.WELCOME: self._on_welcome,
            Kind.VALUES: self._on_values,
            Kind.ACK: self._on_ack,
            Kind.STATS: self._on_stats,
            Kind.LATE: self._on_late,
        }
        self._stats: dict[int, dict[str, Any]] = {}
        self._offered = 0
        self._too_late = False
        self._late: dict[int, str] = {}
        if self.link.made is not None:
            self.link.made(self)
        if self.link.drive is not None:
            self.link.drive(self.connecting())

    # --- the interface for users ---

    def push(self) -> None:
        """Pushes the gradients. Returns before the servers have them.

        A parameter for which no worker has a gradient (`.grad` is None) is left alone, as torch's optimizers do. Every
        server leaves out a gradient that is not finite (`metrics().nonfinite` counts these). In both cases the residual
        keeps its values.

        Raises:
            ConfigError: If a gradient is a sparse tensor, or belongs to a parameter that was frozen when this worker
                was made.
            RemoteError: If a server refused the push before, or a shard is lost with all its servers.
            CommTimeout: If the acknowledgement of the push before did not come.
        """
        self._run(self.pushing())

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for all backward passes of a step but the last, like DDP's: nothing is sent inside it."""
        return self._pusher.paused()

    def pull(self) -> None:
        """Brings the model's parameters up to date; waits as long as the mode demands.

        Raises:
            RemoteError: If a server refused a push, or a shard is lost with all its servers.
            CommTimeout: If a server did not answer. It names the server, which may itself wait for another worker.
        """
        self._run(self.pulling())

    def step(self) -> None:
        """Pushes, then pulls."""
        self._run(self.stepping())

    def statistics(self) -> list[dict[str, Any]]:
        """Asks the servers for each shard's version, clocks, workers that are gone and why, and staleness by worker."""
        return self._run(self.asking())

    def metrics(self) -> WorkerMetrics:
        """Returns a copy of this worker's counters."""
        traffic = self.link.mailbox.traffic
        counted = {**vars(self._counted), "bytes_sent": traffic.bytes_sent, "bytes_received": traffic.bytes_received}
        return WorkerMetrics(**counted)

    def explain(self) -> str:
        """Describes how this worker pulls, with the predicted cost of each way if there was a choice."""
        return self._puller.explain()

    @property
    def versions(self) -> tuple[int, ...]:
        """Version of each shard that the model's parameters have."""
        return tuple(p.version for p in self._parts)

    def residual(self) -> torch.Tensor:
        """Returns a copy of the residual, float32, in the order of the model's flat parameters."""
        kept = [
            torch.zeros(p.spec.numel, dtype=torch.float32) if p.bucket.residual is None else p.bucket.residual
            for p in self._parts
        ]
        return torch.cat(kept)

    def _run(self, steps: Steps[T]) -> T:
        if self.link.drive is None:
            raise StateError("this worker has no driver: iterate over its pushing(), pulling(), ... yourself")
        return self.link.drive(steps)

    # --- the same operations as steps that yield while they wait ---

    def connecting(self) -> Steps[None]:
        """Steps of the constructor: says HELLO to every shard's server, then pulls."""
        digest = hashlib.blake2b(self._flat.numpy().tobytes(), digest_size=8).hexdigest()
        said = {
            "model": self.layout.to_json(),
            "values": digest,
            "shards": len(self._parts),
            "mode": str(self.link.mode),
        }
        body = ms.json_body(said)
        for part in self._parts:
            self._client.ask(Kind.HELLO, part.spec.index, body)
        yield from self._client.wait(Kind.HELLO)
        if self.link.joins:
            yield from self._joining()
        yield from self._client.wait(Kind.INIT)
        yield from self._puller.begin()
        yield from self.pulling()

    def _joining(self) -> Steps[None]:
        """Agrees with all servers on a clock to begin with.

        Shards may be a round apart and go on meanwhile, so each attempt names a clock that lies further ahead.
        """
        ahead, self._too_late = 1, True
        while self._too_late:
            self.clock, self._too_late = self._offered + ahead, False
            for part in self._parts:
                self._client.ask(Kind.JOIN, part.spec.index, clock=self.clock)
            yield from self._client.wait(Kind.JOIN)
            ahead = min(2 * ahead, _MOST_AHEAD)
        self._counted.joined_at = self.clock

    def pushing(self) -> Steps[None]:
        """Steps of `push`."""
        for name, p in self._frozen:
            if p.requires_grad and p.grad is not None:
                raise ConfigError(
                    f"parameter {name!r} has a gradient, but no server has the parameter: it was frozen when the "
                    "Worker was made; freeze it after that"
                )
        if not self._pusher.early:
            yield from self._client.wait(Kind.PUSH)
        self._pusher.push(self.clock)
        self._counted.pushes += 1
        self._counted.dense_bytes += 4 * self._flat.numel()
        self.clock += 1

    def pulling(self) -> Steps[None]:
        """Steps of `pull`."""
        yield from self._puller.pull(self.clock)
        at = 0
        with torch.no_grad():
            for p in self._parameters:
                p.copy_(self._flat[at : at + p.numel()].view(p.shape))
                at += p.numel()
        self._counted.pulls += 1
        self._counted.dense_bytes += 4 * self._flat.numel()

    def stepping(self) -> Steps[None]:
        """Steps of `step`."""
        yield from self.pushing()
        yield from self.pulling()

    def asking(self) -> Steps[list[dict[str, Any]]]:
        """Steps of `statistics`."""
        for part in self._parts:
            self._client.ask(Kind.STATS, part.spec.index)
        yield from self._client.wait(Kind.STATS)
        return [self._stats[p.spec.index] for p in self._parts]

    def leaving(self, why: str = "") -> Steps[None]:
        """Leaves the job once every push is acknowledged. `run` does this when the training function returns.

        Args:
            why: Reason for leaving before the end of training; pushes are then not waited for.
        """
        self._pusher.forget()
        self._pusher.close()
        if not why:
            yield from self._client.wait(Kind.PUSH, Kind.INIT)
        body = ms.text(why)
        for part in self._parts:
            self._client.ask(Kind.BYE, part.spec.index, body)
        # All pushes are acknowledged, so a server that is gone by now takes nothing along.
        with contextlib.suppress(RemoteError):
            yield from self._client.wait(Kind.BYE)

    def blaming(self) -> Steps[None]:
        """Steps that ask the servers which owe an answer whom they wait for; all servers if none owes one.

        `blamed` has the answers that have come so far.
        """
        self._late = dict.fromkeys(self._client.awaited or range(len(self._parts)), "")
        for shard in self._late:
            self._client.ask(Kind.LATE, shard, clock=self.clock)
        yield from self._client.wait(Kind.LATE)

    @property
    def blamed(self) -> str:
        """The ranks that the servers wait for, in words, as `blaming` has found out."""
        owners = self._client.owners
        found = {f"server rank {owners[s]} {w or 'does not answer'}": None for s, w in self._late.items()}
        return "; ".join(found)

    # --- answers ---

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(zip(self.layout.names, self._parameters, strict=True))

    def _on_welcome(self, envelope: Envelope, body: torch.Tensor) -> None:
        """Sends the first values if the server asks for them."""
        self._offered = max(self._offered, envelope.clock)
        if not envelope.flags:
            return
        part = self._parts[envelope.shard]
        self._client.ask(Kind.INIT, part.spec.index, part.encode_first(self._flat[part.spec.start : part.spec.end]))

    def _on_values(self, envelope: Envelope, body: torch.Tensor) -> None:
        part = self._parts[envelope.shard]
        spec = part.spec
        origin = Origin(PULL, spec, envelope.sender, self.link.world, envelope.version)
        pairs, _ = decode(origin, body)
        here = self._flat[spec.start : spec.end]
        if envelope.flags:
            here.copy_(pairs[1])
        else:
            kernels.scatter_add(here, *pairs)
        part.version = envelope.version

    def _on_ack(self, envelope: Envelope, body: torch.Tensor) -> None:
        if envelope.seq == Kind.JOIN:
            self._offered = max(self._offered, envelope.clock)
            self._too_late |= bool(envelope.flags)
        if envelope.seq == Kind.PUSH:
            self._counted.acknowledged += 1
            self._counted.staleness += envelope.flags
            self._counted.stalest = max(self._counted.stalest, envelope.flags)

    def _on_stats(self, envelope: Envelope, body: torch.Tensor) -> None:
        self._stats[envelope.shard] = json.loads(bytes(body.numpy()))

    def _on_late(self, envelope: Envelope, body: torch.Tensor) -> None:
        self._late[envelope.shard] = f"waits for {ms.read_text(body) or 'nobody'}"
