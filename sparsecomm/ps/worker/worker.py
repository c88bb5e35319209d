"""A worker: compresses its gradients and pushes them, pulls parameters into its model."""

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
from sparsecomm.ps.protocol.payloads import PULL, decode
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.worker.client import Client, Link, Steps
from sparsecomm.ps.worker.part import Part
from sparsecomm.ps.worker.puller import Puller
from sparsecomm.ps.worker.pusher import Pusher, WorkerMetrics
from sparsecomm.runtime.arena import Arena

__all__ = ["Worker", "WorkerMetrics", "current_link", "set_current_link"]

T = TypeVar("T")

_link: Link | None = None


def set_current_link(link: Link | None) -> None:
    """Sets what `Worker` uses when it is not given a link: `run` does."""
    global _link
    _link = link


def current_link() -> Link:
    """Returns the link of this process.

    Raises:
        LaunchError: outside of a function that `run` has called.
    """
    if _link is None:
        raise LaunchError("sparsecomm.ps.Worker works inside the function that is given to sparsecomm.ps.run")
    return _link


class Worker:
    """Trains a model whose parameters are on servers.

    Making one connects to the servers and fetches the parameters. `backward` fills gradients as ever; then `step`
    pushes them and pulls what has become of the parameters. Every worker must build its model with the same values.

    Args:
        model: its trainable parameters are replaced by what the servers have; buffers stay this worker's own.
        compressor: how pushes are sparsified, or a whole `SparseConfig`; `TopK(0.01)` if None.
        link: to the servers; the one that `run` made if None.
        overlap: whether what a server gets is sent as soon as backward has computed it (with one server there is
            nothing to gain). Gradients that change after backward (clipping, a second backward) are sent again, and
            after two such steps overlapping ends with a warning; for gradient accumulation there is `no_sync`.
        options: of `SparseConfig`: feedback, value_codec, index_codec, dense_below (elements of a shard), dense_steps.

    Raises:
        ConfigError: for an option or model that cannot be served, or more servers than elements.
        RemoteError: a server refuses this worker: another model, other initial values, another mode.

    Attributes:
        rank: number of this worker, from 0.
        size: number of workers at the start, or of all up to this one if it came later.
        clock: pushes done; a worker that joins begins with those that the others have done when it does.
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
        }
        self._stats: dict[int, dict[str, Any]] = {}
        self._offered = 0
        self._late = False
        if self.link.made is not None:
            self.link.made(self)
        if self.link.drive is not None:
            self.link.drive(self.connecting())

    # --- what users call ---

    def push(self) -> None:
        """Pushes the gradients; parameters without one count as zeros. Returns before the servers have them.

        A gradient that is not finite is left out by every server (`metrics().nonfinite` counts) and the residual stays.

        Raises:
            RemoteError: a server refused the push before; or a shard is lost with all its servers.
            CommTimeout: the acknowledgement of the push before did not come.
        """
        self._run(self.pushing())

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for backward passes that are not the last of a step, as DDP's: nothing is sent in them."""
        return self._pusher.paused()

    def pull(self) -> None:
        """Brings the model's parameters up to date; waits as the mode demands.

        Raises:
            RemoteError: a server refused a push; or a shard is lost with all its servers.
            CommTimeout: names the server that did not answer. It may in turn wait for another worker.
        """
        self._run(self.pulling())

    def step(self) -> None:
        """`push`, then `pull`."""
        self._run(self.stepping())

    def statistics(self) -> list[dict[str, Any]]:
        """Returns what the servers say of each shard: version, clocks, who is gone and why, staleness by worker."""
        return self._run(self.asking())

    def metrics(self) -> WorkerMetrics:
        """Returns a copy of this worker's counters."""
        traffic = self.link.mailbox.traffic
        counted = {**vars(self._counted), "bytes_sent": traffic.bytes_sent, "bytes_received": traffic.bytes_received}
        return WorkerMetrics(**counted)

    def explain(self) -> str:
        """Returns in words how this worker pulls, and what each way was predicted to cost if there was a choice."""
        return self._puller.explain()

    @property
    def versions(self) -> tuple[int, ...]:
        """The version of each shard that the model's parameters are of."""
        return tuple(p.version for p in self._parts)

    def residual(self) -> torch.Tensor:
        """Returns a copy of what was not sent yet, float32, in the order of the model's flat parameters."""
        kept = [torch.zeros(p.spec.numel) if p.bucket.residual is None else p.bucket.residual for p in self._parts]
        return torch.cat(kept)

    def _run(self, steps: Steps[T]) -> T:
        if self.link.drive is None:
            raise StateError("this worker has no driver: iterate over its pushing(), pulling(), ... yourself")
        return self.link.drive(steps)

    # --- the same as steps that yield while they wait ---

    def connecting(self) -> Steps[None]:
        """Says HELLO to every shard's server and pulls."""
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
        """Agrees with all servers on the clock to begin with: shards are a round apart now and then, and go on."""
        ahead, self._late = 1, True
        while self._late:
            self.clock, self._late = self._offered + ahead, False
            for part in self._parts:
                self._client.ask(Kind.JOIN, part.spec.index, clock=self.clock)
            yield from self._client.wait(Kind.JOIN)
            ahead *= 2
        self._counted.joined_at = self.clock

    def pushing(self) -> Steps[None]:
        """See `push`."""
        if not self._pusher.early:
            yield from self._client.wait(Kind.PUSH)
        self._pusher.push(self.clock)
        self._counted.pushes += 1
        self._counted.dense_bytes += 4 * self._flat.numel()
        self.clock += 1

    def pulling(self) -> Steps[None]:
        """See `pull`."""
        yield from self._puller.pull(self.clock)
        at = 0
        with torch.no_grad():
            for p in self._parameters:
                p.copy_(self._flat[at : at + p.numel()].view(p.shape))
                at += p.numel()
        self._counted.pulls += 1
        self._counted.dense_bytes += 4 * self._flat.numel()

    def stepping(self) -> Steps[None]:
        """See `step`."""
        yield from self.pushing()
        yield from self.pulling()

    def asking(self) -> Steps[list[dict[str, Any]]]:
        """See `statistics`."""
        for part in self._parts:
            self._client.ask(Kind.STATS, part.spec.index)
        yield from self._client.wait(Kind.STATS)
        return [self._stats[p.spec.index] for p in self._parts]

    def leaving(self, why: str = "") -> Steps[None]:
        """Waits until every push is acknowledged and leaves the job; `run` does it when the function returns."""
        self._pusher.forget()
        self._pusher.close()
        if not why:
            yield from self._client.wait(Kind.PUSH, Kind.INIT)
        body = ms.text(why)
        for part in self._parts:
            self._client.ask(Kind.BYE, part.spec.index, body)
        # Everything is acknowledged: servers that are gone before they hear of it take nothing along.
        with contextlib.suppress(RemoteError):
            yield from self._client.wait(Kind.BYE)

    # --- answers ---

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(zip(self.layout.names, self._parameters, strict=True))

    def _on_welcome(self, envelope: Envelope, body: torch.Tensor) -> None:
        """Sends the first values if this worker is asked for them."""
        self._offered = max(self._offered, envelope.clock)
        if not envelope.flags:
            return
        part = self._parts[envelope.shard]
        self._client.ask(Kind.INIT, part.spec.index, part.first(self._flat[part.spec.start : part.spec.end]))

    def _on_values(self, envelope: Envelope, body: torch.Tensor) -> None:
        part = self._parts[envelope.shard]
        spec = part.spec
        selected, _ = decode(PULL, spec, body, rank=envelope.sender, world=self.link.world, step=envelope.version)
        here = self._flat[spec.start : spec.end]
        if envelope.flags:
            here.copy_(selected[1])
        else:
            kernels.scatter_add(here, *selected)
        part.version = envelope.version

    def _on_ack(self, envelope: Envelope, body: torch.Tensor) -> None:
        if envelope.seq == Kind.JOIN:
            self._offered = max(self._offered, envelope.clock)
            self._late |= bool(envelope.flags)
        if envelope.seq == Kind.PUSH:
            self._counted.acknowledged += 1
            self._counted.staleness += envelope.flags
            self._counted.stalest = max(self._counted.stalest, envelope.flags)

    def _on_stats(self, envelope: Envelope, body: torch.Tensor) -> None:
        self._stats[envelope.shard] = json.loads(bytes(body.numpy()))
