"""A job whose servers and workers take turns in one process, deterministic to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from simulated_mailbox import SimulatedMailboxes, SimulatedWindow

from sparsecomm.errors import CommTimeout
from sparsecomm.ps.server.options import ServerOptions
from sparsecomm.ps.server.rules import Rules
from sparsecomm.ps.server.server import Server
from sparsecomm.ps.worker.link import Link, Steps

__all__ = ["Flat", "SimulatedJob", "sgd"]

_TURNS = 5  # per second
_STUCK = 100  # turns without any progress, longer than servers keep deferred messages


class Flat(torch.nn.Module):
    """A model of one flat parameter."""

    def __init__(self, numel: int, name: str = "weight", start: float = 0.0) -> None:
        super().__init__()
        self.register_parameter(name, torch.nn.Parameter(torch.full((numel,), start, dtype=torch.float32)))


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with rate 1, so that an update subtracts the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


class SimulatedJob:
    """Workers at ranks 0 .. W-1 and servers at the ranks after them.

    Args:
        workers: Number of workers at the start.
        servers: Number of servers.
        windows: Whether workers read shards from windows.
        joiners: Number of workers that come later, at the ranks after the servers.
        replicate: Whether shards have backups; None: if there is more than one server.
        options: Options of `Rules`, and `checkpoints` of `ServerOptions`.

    Attributes:
        mailboxes: Mailboxes of all ranks; has `kill` and `tamper`.
        servers: The servers, by index.
        memories: Memories of the windows, by rank.
        turns: Number of turns so far, five per second of the servers' clock.
    """

    def __init__(
        self,
        workers: int,
        servers: int,
        *,
        joiners: int = 0,
        windows: bool = False,
        replicate: bool | None = None,
        **options: Any,
    ) -> None:
        self.mailboxes = SimulatedMailboxes(workers + servers + joiners)
        self.turns = 0
        self.memories: dict[int, torch.Tensor] = {}
        self._windows = windows
        ranks = tuple(range(workers)), tuple(range(workers, workers + servers))
        own = {name: options.pop(name) for name in ("checkpoints",) if name in options}
        self.rules = Rules(workers=ranks[0], world=workers + servers, **options)
        backed = servers > 1 if replicate is None else replicate
        chosen = ServerOptions(servers=ranks[1], replicate=backed, now=lambda: self.turns / _TURNS, **own)
        self.servers = [Server(self.mailboxes.by_rank[r], self.rules, chosen) for r in ranks[1]]
        later = range(self.rules.world, self.rules.world + joiners)
        self.links = [self._link(r, ranks[1]) for r in (*ranks[0], *later)]

    def _link(self, rank: int, servers: tuple[int, ...]) -> Link:
        workers = tuple(dict.fromkeys((*self.rules.workers, rank)))
        link = Link(self.mailboxes.by_rank[rank], servers, workers, self.rules.world, self.rules.mode)
        if not self._windows:
            return link
        return replace(link, pull_by="one_sided", open_window=lambda nbytes: self.window(rank, nbytes))

    def window(self, rank: int, nbytes: int) -> SimulatedWindow:
        """Makes the window of a rank."""
        self.memories[rank] = torch.zeros(nbytes, dtype=torch.uint8)
        return SimulatedWindow(self.memories, rank)

    def run(self, tasks: Sequence[Steps[Any]], *, between: Callable[[int], None] | None = None) -> list[Any]:
        """Gives workers and servers turns until all workers have ended.

        Args:
            tasks: Steps of each worker, in the order of `links`.
            between: Called with the number of each turn; may kill.

        Returns:
            Result of each task, or its exception, or None for a worker that was killed.

        Raises:
            CommTimeout: If nobody can go on. It names the thing that each worker waits for.
        """
        results: list[Any] = [None] * len(tasks)
        waiting = dict.fromkeys(range(len(tasks)), "")
        still = 0
        while waiting:
            self.turns += 1
            if between is not None:
                between(self.turns)
            before = [mailbox.traffic.messages_received for mailbox in self.mailboxes.by_rank]
            count = len(waiting)
            for number in list(waiting):
                self._turn(number, tasks[number], waiting, results)
            self.serve()
            moved = (
                before != [mailbox.traffic.messages_received for mailbox in self.mailboxes.by_rank]
                or len(waiting) < count
            )
            still = 0 if moved else still + 1
            if still > _STUCK:
                raise CommTimeout("; ".join(f"worker {r} waits for {awaited}" for r, awaited in waiting.items()))
        return results

    def serve(self) -> None:
        """Gives every living server a turn."""
        for server in self.servers:
            if server.mailbox.rank not in self.mailboxes.dead:
                server.turn()
                if self._windows and server.may_open_window() and server.mailbox.rank not in self.memories:
                    rank = server.mailbox.rank
                    server.open_window(lambda nbytes, rank=rank: self.window(rank, nbytes))  # type: ignore[misc]

    def _turn(self, number: int, task: Steps[Any], waiting: dict[int, str], results: list[Any]) -> None:
        if self.links[number].mailbox.rank in self.mailboxes.dead:
            del waiting[number]
            return
        try:
            waiting[number] = next(task)
        except StopIteration as stop:
            results[number] = stop.value
            del waiting[number]
        except Exception as error:
            results[number] = error
            del waiting[number]
