"""Tags of the backend's messages, and the slots by which process groups keep them apart.

The engine's own collectives use the lower half of the transport's tags, process groups the upper half. A process group
has a slot: a range of tags that no other group with a common rank has. Its members agree on the lowest slot that is
free on all of them when the group is made, and give it back when it is destroyed. One half of a slot is for
collectives, by their number, and one for messages, by the user's tag.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass

import torch

from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["Slots", "TagSpace"]

_SLOT_BITS = 12


@dataclass(frozen=True, slots=True)
class TagSpace:
    """The upper half of a transport's tags.

    Attributes:
        base: The first tag.
        slots: Number of slots. Slot 0 is that of groups that are being made.
        width: Tags of a slot.
    """

    base: int
    slots: int
    width: int

    @classmethod
    def of(cls, max_tag: int) -> TagSpace:
        """Returns the tags of a transport with this largest tag."""
        bits = max_tag.bit_length() - 1
        slot_bits = min(_SLOT_BITS, bits // 2)
        return cls(1 << bits, 1 << slot_bits, 1 << (bits - slot_bits))

    def making(self, name: str) -> int:
        """Returns the tag of the messages that make a group of this name."""
        return self.base + zlib.crc32(name.encode()) % self.width

    def collective(self, slot: int, number: int) -> int:
        """Returns the tag of the collective of a group with this number."""
        return self.base + slot * self.width + number % (self.width // 2)

    def message(self, slot: int, tag: int) -> int:
        """Returns the tag of messages of a group with the user's tag.

        Raises:
            ConfigError: if the user's tag is negative or too large.
        """
        most = self.width // 2
        if not 0 <= tag < most:
            raise ConfigError(f"tag = {tag} of a message: this MPI allows tags from 0 to {most - 1}")
        return self.base + slot * self.width + most + tag


class Slots:
    """The slots that the process groups of this rank use. Any thread may use it.

    Args:
        count: Number of slots, at most 4096.
    """

    def __init__(self, count: int) -> None:
        self._free = torch.ones(count, dtype=torch.uint8)
        self._free[0] = 0
        self._lock = threading.Lock()

    def agree(self, channel: Channel) -> CollectiveSteps[int]:
        """Takes the lowest slot that is free on all ranks of a group. Collective.

        Raises:
            TransportError: if there is none.
        """
        with self._lock:
            mine = self._free.clone()
        others = [torch.empty_like(mine) for _ in range(channel.size - 1)]
        peers = [r for r in range(channel.size) if r != channel.rank]
        if peers:
            receives = [channel.irecv(other, r) for other, r in zip(others, peers, strict=True)]
            yield receives + [channel.isend(mine, r) for r in peers]
        free = mine
        for other in others:
            free = free & other
        slot = int(free.argmax())
        if not free[slot]:
            raise TransportError(f"no tags are left for another process group; destroy one ({len(mine)} are the most)")
        with self._lock:
            self._free[slot] = 0
        return slot

    def give_back(self, slot: int) -> None:
        """Makes a slot free on this rank."""
        with self._lock:
            self._free[slot] = 1
