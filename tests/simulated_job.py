"""Servers and workers of a job in one process, taking turns: for tests, deterministic to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from simulated_mailbox import SimulatedMailboxes, SimulatedWindow

from sparsecomm.errors import CommTimeout
from sparsecomm.ps.server.rules import Rules, ServerOptions
from sparsecomm.ps.server.server import Server
from sparsecomm.ps.worker.client import Link, Steps

__all__ = ["SimulatedJob"]

_TURNS = 5  # a second
_STUCK = 100  # turns in which nothing moved, long enough for messages that are held for a dead server's sake


class SimulatedJob:
    """Workers at ranks 0 .. W-1 and servers behind them.

    Args:
        workers: how many.
        servers: how many.
        windows: whether workers read shards from windows.
        joiners: workers that come later, at the ranks behind the servers.
        replicate: whether shards have backups; by default where there is more than one server.
        options: of `Rules` and, for `restore` and `saved`, of `ServerOptions`.

    Attributes:
        office: their mailboxes; has `kill` and `tamper`.
        servers: by index.
        memories: of the windows, by rank.
        turns: how many have passed, five a second of the servers' clock.
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
        self.office = SimulatedMailboxes(workers + servers + joiners)
        self.turns = 0
        self.memories: dict[int, torch.Tensor] = {}
        self._windows = windows
        ranks = tuple(range(workers)), tuple(range(workers, workers + servers))
        own = {name: options.pop(name) for name in ("restore", "saved") if name in options}
        self.rules = Rules(workers=ranks[0], world=workers + servers, **options)
        backed = servers > 1 if replicate is None else replicate
        chosen = ServerOptions(servers=ranks[1], replicate=backed, now=lambda: self.turns / _TURNS, **own)
        self.servers = [Server(self.office.mailboxes[r], self.rules, chosen) for r in ranks[1]]
        later = range(self.rules.world, self.rules.world + joiners)
        self.links = [self._link(r, ranks[1]) for r in (*ranks[0], *later)]

    def _link(self, rank: int, servers: tuple[int, ...]) -> Link:
        workers = tuple(dict.fromkeys((*self.rules.workers, rank)))
        link = Link(self.office.mailboxes[rank], servers, workers, self.rules.world, self.rules.mode)
        if not self._windows:
            return link
        return replace(link, pull_by="one_sided", open_window=lambda nbytes: self.window(rank, nbytes))

    def window(self, rank: int, nbytes: int) -> SimulatedWindow:
        """Makes a window of a rank."""
        self.memories[rank] = torch.zeros(nbytes, dtype=torch.uint8)
        return SimulatedWindow(self.memories, rank)

    def run(self, tasks: Sequence[Steps[Any]], *, between: Callable[[int], None] | None = None) -> list[Any]:
        """Gives workers and servers turns until all workers have ended.

        Args:
            tasks: what each worker does, in the order of `links`; their results are returned, or their exceptions, or
                None for a worker that was killed.
            between: called with the number of each turn; may kill.

        Raises:
            CommTimeout: when nobody can go on; says who waits for what.
        """
        results: list[Any] = [None] * len(tasks)
        waiting = dict.fromkeys(range(len(tasks)), "")
        still = 0
        while waiting:
            self.turns += 1
            if between is not None:
                between(self.turns)
            before = [mailbox.traffic.messages_received for mailbox in self.office.mailboxes]
            left = len(waiting)
            for number in list(waiting):
                self._turn(number, tasks[number], waiting, results)
            self.serve()
            moved = (
                before != [mailbox.traffic.messages_received for mailbox in self.office.mailboxes]
                or len(waiting) < left
            )
            still = 0 if moved else still + 1
            if still > _STUCK:
                raise CommTimeout("; ".join(f"worker {r} waits for {what}" for r, what in waiting.items()))
        return results

    def serve(self) -> None:
        """Gives every living server a turn."""
        for server in self.servers:
            if server.mailbox.rank not in self.office.dead:
                server.turn()
                if self._windows and server.opens() and server.mailbox.rank not in self.memories:
                    rank = server.mailbox.rank
                    server.open(lambda nbytes, rank=rank: self.window(rank, nbytes))  # type: ignore[misc]

    def _turn(self, number: int, task: Steps[Any], waiting: dict[int, str], results: list[Any]) -> None:
        if self.links[number].mailbox.rank in self.office.dead:
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
