"""The part of a process group that knows the engine: its ranks, tags and operations in flight, and messages.

Every operation is a generator over a channel. The engine's thread drives it, so operations of any groups may be in
flight in any order. Collectives of one group start in the order of the calls; messages start at once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from typing_extensions import override

from sparsecomm.backend import checking
from sparsecomm.backend.meeting import meet
from sparsecomm.backend.octets import Flat, check_tensors
from sparsecomm.backend.tags import Slots, TagSpace
from sparsecomm.backend.work import EngineWork, JoinedWork
from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Engine, Task

__all__ = ["EngineGroup", "Members"]

_ARENAS = 4
"""Most arenas that a group keeps while nothing is in flight; each has the buffers of its longest collective."""

Steps = Callable[[Channel, Arena], CollectiveSteps[Any]]


@dataclass(frozen=True, slots=True)
class Members:
    """The ranks of a process group.

    Attributes:
        engine: The engine of this rank's world.
        ranks: World ranks, in the group's order.
        name: Name of the group, the same on all its ranks.
        timeout: Seconds that an operation may take; None for the engine's timeout.
    """

    engine: Engine
    ranks: tuple[int, ...]
    name: str
    timeout: float | None


_makings = itertools.count()
"""Numbers the makings of groups, each of which fails alone."""
_slots_of: WeakKeyDictionary[Engine, Slots] = WeakKeyDictionary()


def _slots(engine: Engine) -> Slots:
    return _slots_of.setdefault(engine, Slots(TagSpace.of(engine.transport.max_tag).slots))


class EngineGroup(dist.ProcessGroup):
    """A process group without collectives. Its construction is collective among its ranks.

    Args:
        members: The ranks.
    """

    def __init__(self, members: Members) -> None:
        engine = members.engine
        rank: Any = members.ranks.index(engine.transport.rank)
        super().__init__(rank, len(members.ranks))  # type: ignore[call-arg]
        self._engine, self._members = engine, members
        self._timeout = members.timeout
        everyone = tuple(range(engine.transport.size))
        self._ranks = None if members.ranks == everyone else members.ranks
        self._tags = TagSpace.of(engine.transport.max_tag)
        self._lock = threading.Lock()
        self._number = 0
        self._in_flight: dict[EngineWork, None] = {}
        self._arenas: list[Arena] = []
        self._gathered: list[dist.Work] | None = None
        self._checks = checking.is_wanted()
        self._is_open = True
        self._description = "undefined"
        self._slot = self._agree_on_slot()

    def _agree_on_slot(self) -> int:
        label = f"making of the process group {self._members.name!r}"
        done: EngineWork = EngineWork(label, [])
        found: list[int] = []

        def took(slot: int) -> None:
            found.append(slot)
            done.succeed(None)

        slots, tag = _slots(self._engine), self._tags.making(self._members.name)
        alone = -1 - next(_makings)
        self._engine.submit(
            Task(
                label,
                slots.agree,
                took,
                done.fail,
                group=self._ranks,
                lane=-1,
                tag=tag,
                timeout=self._timeout,
                domain=alone,
            )
        )
        done.wait()
        return found[0]

    # --- operations ---------------------------------------------------------------------------------------------------

    def _start(self, call: str, outputs: Sequence[torch.Tensor], steps: Steps, timeout: timedelta | None = None) -> Any:
        """Starts a collective and returns its Work.

        Args:
            call: Description of the call. Ranks that call the same have the same text.
            outputs: Tensors that hold the result.
            steps: Called with a channel and an arena; returns the generator of the collective.
            timeout: Most time that it may take; None or a time that is not positive for the group's timeout.
        """
        name = call.partition("(")[0]
        with self._lock:
            number = self._number
            self._number += 1
            label = f"{name} {number} of process group {self._members.name!r}"
            work = EngineWork(label, outputs)
            tag, lane = self._tags.collective(self._slot, number), self._slot
            told = f"{call} as number {number} of group {self._members.name!r}"

            def run(channel: Channel) -> CollectiveSteps[Any]:
                if self._checks and channel.size > 1:
                    yield from checking.compare(channel, told)
                arena = self._arenas.pop() if self._arenas else Arena()
                yield from steps(channel, arena)
                if len(self._arenas) < _ARENAS:
                    self._arenas.append(arena)

            self._submit(work, run, lane, tag, timeout)
        return self._gather(work)

    def _submit(
        self,
        work: EngineWork,
        run: Callable[[Channel], CollectiveSteps[Any]],
        lane: int,
        tag: int,
        timeout: timedelta | None,
    ) -> None:
        if not self._is_open:
            raise TransportError(f"{work.label}: the process group was destroyed")
        limit = timeout.total_seconds() if timeout is not None and timeout > timedelta(0) else self._timeout

        def done(source: int | None) -> None:
            self._in_flight.pop(work, None)
            work.succeed(source)

        def failed(error: BaseException) -> None:
            self._in_flight.pop(work, None)
            work.fail(error)

        self._in_flight[work] = None
        try:
            self._engine.submit(
                Task(
                    work.label,
                    run,
                    done,
                    failed,
                    group=self._ranks,
                    lane=lane,
                    tag=tag,
                    timeout=limit,
                    domain=self._slot,
                )
            )
        except BaseException:
            del self._in_flight[work]
            raise

    def _gather(self, work: EngineWork) -> Any:
        if self._gathered is not None:
            self._gathered.append(work)
        return work

    def _start_coalescing(self, device: torch.device) -> None:
        self._gathered = []

    def _end_coalescing(self, device: torch.device) -> Any:
        gathered, self._gathered = self._gathered or [], None
        return JoinedWork(gathered)

    # --- messages -----------------------------------------------------------------------------------------------------

    @override
    def send(self, tensors: list[torch.Tensor], dstRank: int, tag: int) -> Any:
        """Sends tensors to a group rank."""
        check_tensors(tensors, "send")
        self._check_rank(dstRank)

        def run(channel: Channel) -> CollectiveSteps[None]:
            yield [channel.isend(Flat(tensors).octets, dstRank)]

        return self._message(f"send to rank {dstRank}", tensors, run, tag)

    @override
    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int) -> Any:
        """Receives tensors from a group rank."""
        check_tensors(tensors, "recv")
        self._check_rank(srcRank)

        def run(channel: Channel) -> CollectiveSteps[int]:
            flat = Flat(tensors, read=False)
            yield [channel.irecv(flat.octets, srcRank)]
            flat.write()
            return srcRank

        return self._message(f"recv from rank {srcRank}", tensors, run, tag)

    @override
    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> Any:
        """Receives tensors from any rank of the group, which the work's `source_rank` tells."""
        check_tensors(tensors, "recv")

        def run(channel: Channel) -> CollectiveSteps[int]:
            flat = Flat(tensors, read=False)
            request = channel.irecv_any(flat.octets)
            yield [request]
            flat.write()
            assert request.peer is not None, "it is complete"
            return self._members.ranks.index(request.peer)

        return self._message("recv from any rank", tensors, run, tag)

    def _message(
        self, name: str, tensors: list[torch.Tensor], run: Callable[[Channel], CollectiveSteps[Any]], tag: int
    ) -> Any:
        label = f"{name} with tag {tag} in process group {self._members.name!r}"
        work = EngineWork(label, tensors)
        with self._lock:
            self._submit(work, run, -1 - self._slot, self._tags.message(self._slot, tag), None)
        return self._gather(work)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size():
            raise ConfigError(f"rank {rank} is none of process group {self._members.name!r} with {self.size()} ranks")

    # --- the monitored barrier ----------------------------------------------------------------------------------------

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Waits for all ranks, and fails alone, on all ranks that came, if some do not come. Collective.

        Args:
            timeout: Most time to wait for the others; None for the timeout of the group.
            wait_all_ranks: Whether rank 0 names all ranks that did not come, not only the first.

        Raises:
            CommTimeout: if ranks did not come. The message of rank 0 names them. The group stays usable.
        """
        limit = self._timeout or self._engine.timeout if timeout is None else timeout.total_seconds()

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            return meet(channel, limit, wait_all_ranks)

        margin = timedelta(seconds=2 * limit + 60)  # its own deadline comes first
        self._start(f"monitored_barrier(timeout={limit:g})", [], steps, margin).wait()

    # --- its end ------------------------------------------------------------------------------------------------------

    @override
    def shutdown(self) -> None:
        """Ends the group. Operations in flight go on."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            if not self._in_flight and self._engine.breakage.cause(self._slot) is None:
                _slots(self._engine).give_back(self._slot)  # else a later group would get messages of this one

    @override
    def abort(self) -> None:
        """Ends the group and fails its operations in flight on this rank."""
        stuck = list(self._in_flight)
        self.shutdown()
        for work in stuck:
            work.fail(TransportError(f"{work.label}: the process group was aborted"))

    @override
    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the time that later operations may take."""
        self._timeout = timeout.total_seconds()

    @override
    def size(self) -> int:
        return len(self._members.ranks)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> Any:
        return self

    @property
    def supports_splitting(self) -> bool:
        """Whether the group can be split by torch's C++."""
        return False

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """Returns whether the group has memory of its own for tensors."""
        return False

    def getBackendName(self) -> str:
        """Returns the name of the backend."""
        return "sparsecomm"

    @property
    def group_name(self) -> Any:
        """Name of the group, by which torch's functional collectives find it."""
        return self._members.name

    def getGroupName(self) -> str:
        """Returns the name of the group."""
        return self._members.name

    def _set_group_desc(self, desc: str) -> None:
        self._description = desc

    @property
    def group_desc(self) -> str:
        """Description of the group."""
        return self._description

    def getGroupDesc(self) -> str:
        """Returns the description of the group."""
        return self._description

    def _set_sequence_number_for_group(self) -> None:
        """Does nothing, because the group has counted from its first collective."""

    def _get_sequence_number_for_group(self) -> int:
        return self._number
