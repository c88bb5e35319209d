"""The debug mode: before every collective all ranks compare what they are about to do.

On when TORCH_DISTRIBUTED_DEBUG is DETAIL. It costs a round of messages for each collective.
"""

from __future__ import annotations

import torch
from torch._C._distributed_c10d import DebugLevel, get_debug_level

from sparsecomm.backend.moves import gather_all
from sparsecomm.errors import CollectiveMismatch
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps

__all__ = ["compare", "is_wanted"]

_BYTES = 512


def is_wanted() -> bool:
    """Returns whether the environment asks for the debug mode."""
    return bool(get_debug_level() == DebugLevel.DETAIL)


def compare(channel: Channel, mine: str) -> CollectiveSteps[None]:
    """Compares the description of a collective between all ranks. Collective.

    Args:
        channel: Ranks that take part.
        mine: This rank's description. Ranks that agree have the same text.

    Raises:
        AgreedError: if ranks differ; on all ranks, with a `CollectiveMismatch` that names both sides.
    """
    told = mine.encode()[:_BYTES].ljust(_BYTES, b"\0")
    record = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    records = [record if r == channel.rank else torch.empty_like(record) for r in range(channel.size)]
    yield from gather_all(channel, record, records)
    texts = [bytes(r.tolist()).rstrip(b"\0").decode(errors="replace") for r in records]
    if len(set(texts)) == 1:
        return
    sides: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        sides.setdefault(text, []).append(channel.world_rank(rank))
    said = "; ".join(f"rank {', '.join(map(str, ranks))} calls {text}" for text, ranks in sides.items())
    raise AgreedError(CollectiveMismatch(f"ranks are in different collectives: {said}"))
