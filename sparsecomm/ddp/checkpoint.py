"""Checkpoints of a state: one flat dict of tensors per rank, checked completely before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from sparsecomm.compress.base import SelectorMemory
from sparsecomm.ddp.entries import alignment_of, as_state_dict, count_of, layout_hash_of, memory_of, selector_of
from sparsecomm.errors import StateError
from sparsecomm.feedback import Alignment
from sparsecomm.runtime.names import plain_name
from sparsecomm.runtime.shards import WHOLE, Place

__all__ = ["Checkpoint", "fill_names", "reshard"]

_MEMORIES = ("residual", "velocity", "second_moment")
_SELECTOR = "selector."
_ALIGNMENT = "alignment."
_MOMENT_STEPS = "moment_steps"
_NUMBERS = ("step", "rank", "world_size")
_PLACE = ("shard", "shards")
_Entry = TypeVar("_Entry")


@dataclass
class Checkpoint:
    """The checkpoint of one rank.

    Attributes:
        step: training step.
        rank: rank that saved it.
        world_size: ranks of the group that saved it.
        place: the shard of the model whose parameters it is of.
        memories: tensors by kind ("residual", "velocity", "second_moment") and parameter name; float32, in the
            shape of the rank's part of the parameter.
        moment_steps: steps that the moments of Adam correction have seen.
        selectors: the compressor's memory of each bucket, by layout hash.
        alignments: how far the ranks agreed in the bucket of each parameter, by parameter name.
    """

    step: int
    rank: int
    world_size: int
    place: Place = WHOLE
    memories: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {kind: {} for kind in _MEMORIES})
    moment_steps: int = 0
    selectors: dict[int, SelectorMemory] = field(default_factory=dict)
    alignments: dict[str, Alignment] = field(default_factory=dict)

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Returns the flat dict of tensors."""
        out = {name: torch.tensor(getattr(self, name), dtype=torch.int64) for name in _NUMBERS}
        if self.place != WHOLE:
            out |= {name: torch.tensor(n, dtype=torch.int64) for name, n in zip(_PLACE, self.place, strict=True)}
        if self.memories["second_moment"]:
            out[_MOMENT_STEPS] = torch.tensor(self.moment_steps, dtype=torch.int64)
        for kind, named in self.memories.items():
            out.update({f"{kind}.{name}": t for name, t in sorted(named.items())})
        for layout, m in sorted(self.selectors.items()):
            numbers = torch.tensor([m.threshold, m.age, m.k], dtype=torch.float64)
            out[f"{_SELECTOR}{layout:016x}"] = numbers
        for name, a in sorted(self.alignments.items()):
            squares = [a.gradient.mean, a.gradient.each, a.residual.mean, a.residual.each]
            out[f"{_ALIGNMENT}{name}"] = torch.tensor([a.size, a.count, *squares], dtype=torch.float64)
        return out

    @classmethod
    def from_dict(cls, state_dict: Mapping[str, torch.Tensor]) -> Checkpoint:
        """Reads a flat dict, and checks every entry for itself.

        Raises:
            StateError: if it is not a checkpoint of a `SparseState`; names the entry.
        """
        given = as_state_dict(state_dict)
        missing = [name for name in _NUMBERS if name not in given]
        if missing:
            raise StateError(f"this is not a SparseState checkpoint: it has no {', '.join(missing)}")
        step, rank, world_size = (count_of(name, given[name]) for name in _NUMBERS)
        made = cls(step, rank, world_size, _place_in(given))
        unknown = []
        for key, value in given.items():
            kind, _, name = key.partition(".")
            name = plain_name(name)
            if name and kind in made.memories:
                _put(made.memories[kind], name, memory_of(kind, name, value), kind)
            elif key.startswith(_SELECTOR):
                made.selectors[layout_hash_of(key, _SELECTOR)] = selector_of(key, value)
            elif name and key.startswith(_ALIGNMENT):
                _put(made.alignments, name, alignment_of(key, value), kind)
            elif key == _MOMENT_STEPS:
                made.moment_steps = count_of(key, value)
            elif key not in (*_NUMBERS, *_PLACE):
                unknown.append(key)
        if unknown:
            raise StateError(f"this is not a SparseState checkpoint: it has unknown entries {sorted(unknown)}")
        if (_MOMENT_STEPS in given) != bool(made.memories["second_moment"]):
            has, lacks = (_MOMENT_STEPS, "second_moment")[:: 1 if _MOMENT_STEPS in given else -1]
            raise StateError(f"the checkpoint has {has}, but no {lacks}; Adam correction saves both")
        return made

    def check(self) -> None:
        """Checks that the entries fit each other, as far as that does not depend on a model.

        Raises:
            StateError: if they do not, or steps were taken but no residual is named.
        """
        for kind in ("velocity", "second_moment"):
            for name, t in self.memories[kind].items():
                shapes = {tuple(m.shape) for m in (t, self.memories["residual"].get(name, t))} - {(0,)}
                if len(shapes) > 1:
                    raise StateError(f"residual and {kind} of {name!r} have different shapes: {sorted(shapes)}")
        if self.moment_steps > self.step:
            raise StateError(f"the checkpoint's moment_steps = {self.moment_steps} are more than its step {self.step}")
        if self.step > 0 and not self.memories["residual"]:
            raise StateError(
                f"the checkpoint of step {self.step} names no residual: torch.distributed.checkpoint fills only the "
                "tensors it is given, so register the hook (or pass model=) before loading into a new state"
            )


def _place_in(given: Mapping[str, object]) -> Place:
    """Returns the place that a checkpoint names; `WHOLE` if it names none."""
    found = [count_of(name, given[name]) for name in _PLACE if name in given]
    if not found:
        return WHOLE
    if len(found) < len(_PLACE) or found[0] >= found[1]:
        raise StateError(f"the checkpoint's shard and shards must be a number below another one, got {found}")
    return Place(*found)


def _put(into: dict[str, _Entry], name: str, value: _Entry, kind: str) -> None:
    if name in into:
        raise StateError(f"this is not a SparseState checkpoint: it has the {kind} of {name!r} twice")
    into[name] = value


def fill_names(residuals: dict[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], kept: set[str]) -> None:
    """Adds an entry for every parameter without one: zeros if it may get a residual, else an empty tensor.

    Args:
        residuals: residuals by parameter name. Mutated.
        shapes: parameter shapes of the model, by name.
        kept: names of the parameters that may get a residual.
    """
    for name, shape in shapes.items():
        if name not in residuals:
            residuals[name] = torch.zeros(shape if name in kept else 0, dtype=torch.float32)


def reshard(
    state_dicts: Sequence[Mapping[str, torch.Tensor]], world_size: int, *, shards: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Turns the checkpoints of all ranks into checkpoints for another world size. Loses nothing.

    An update is the sum over ranks divided by P, so (sum of residuals) / P must stay the same. With P ranks before and
    P' after, residuals are therefore multiplied by P' / P. If the world shrinks, rank j takes over the residuals of
    ranks j, j + P', ...; if it grows, ranks j, j + P, ... share those of rank j equally. Velocities, which each rank
    holds for the gradients it computed, are distributed in the same way. Second moments, which are not sums, are
    averaged or copied.

    With `average_replicas`, ranks are the replicas that hold one shard, and `shards` is for another number of shards.

    Args:
        state_dicts: `SparseState.state_dict()` of each rank, in rank order; with `shards`, of all ranks of the first
            replica, then of the second, and so on.
        world_size: the new world size; of a sharded model, the new number of replicas.
        shards: the new number of shards of a replica; 1 for a whole model. None keeps the shard that was saved.

    Returns:
        One state dict per rank, for `load_state_dict`; with `shards`, in the order in which they were given.

    Raises:
        StateError: if these are not the checkpoints of all ranks of one world at one step.
    """
    for name, number in (("world_size", world_size), ("shards", 1 if shards is None else shards)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise StateError(f"{name} must be a whole number >= 1, got {number!r}")
    old = [Checkpoint.from_dict(d) for d in state_dicts]
    if shards is None:
        return [made.to_dict() for made in _resized(old, world_size)]
    whole = [made for replica in _resized(_joined(old), world_size) for made in _split(replica, shards)]
    return [made.to_dict() for made in whole]


def _joined(old: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Returns the checkpoint of each replica as a whole model's; thresholds and alignments, which shards have, drop."""
    count = old[0].place.shards if old else 1
    if any((c.rank, *c.place) != (i // count, i % count, count) for i, c in enumerate(old)) or len(old) % count:
        saved = ", ".join(f"rank {c.rank} of {c.world_size} with {c.place}" for c in old)
        raise StateError(f"need the checkpoints of all shards of all replicas, replica by replica, got: {saved}")
    return [_whole(old[first : first + count]) for first in range(0, len(old), count)]


def _whole(shards: Sequence[Checkpoint]) -> Checkpoint:
    """Returns one replica's checkpoint. Shards are rows, which follow each other."""
    first = shards[0]
    if len({(c.step, c.moment_steps, c.world_size) for c in shards}) > 1:
        raise StateError(f"the shards of rank {first.rank} are of different steps or runs: {[c.step for c in shards]}")
    made = Checkpoint(first.step, first.rank, first.world_size, moment_steps=first.moment_steps)
    for kind, into in made.memories.items():
        if len({frozenset(c.memories[kind]) for c in shards}) > 1:
            raise StateError(f"the shards of rank {first.rank} are of different models: each has other names of {kind}")
        for name, part in first.memories[kind].items():
            filled = [t for t in (c.memories[kind][name] for c in shards) if t.numel()]
            into[name] = torch.cat(filled) if len(filled) > 1 else [*filled, part][0]
    return made


def _split(whole: Checkpoint, shards: int) -> list[Checkpoint]:
    """Returns the checkpoints of a replica's shards, with rows as `fully_shard` divides them."""
    if shards == 1:
        return [whole]
    out = [replace(whole, place=Place(i, shards), memories={kind: {} for kind in _MEMORIES}) for i in range(shards)]
    for kind, named in whole.memories.items():
        for name, t in named.items():
            if not t.dim():
                raise StateError(f"{kind} of {name!r} has no rows to shard, and fully_shard takes no such parameter")
            rows = -(-t.shape[0] // shards)
            for i, made in enumerate(out):
                made.memories[kind][name] = t[i * rows : (i + 1) * rows].clone()
    return out


def _resized(old: Sequence[Checkpoint], world_size: int) -> list[Checkpoint]:
    """Returns checkpoints of one shard for another number of ranks."""
    if not old or [c.rank for c in old] != list(range(len(old))) or any(c.world_size != len(old) for c in old):
        saved = ", ".join(f"rank {c.rank} of {c.world_size}" for c in old)
        raise StateError(f"need the checkpoints of all ranks of one world in rank order, got: {saved or 'none'}")
    if len({c.step for c in old}) > 1:
        raise StateError(
            f"the checkpoints of ranks 0 to {len(old) - 1} are of different steps: {[c.step for c in old]}"
        )
    for c in old:
        c.check()
        _check_alike(old[0], c)
    return [_new_rank(old, j, world_size) for j in range(world_size)]


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Checks that two ranks' checkpoints are of one run at one step, as far as it shows."""
    if first.place != other.place:
        raise StateError(
            f"rank 0 saved {first.place}, rank {other.rank} saved {other.place}: reshard takes the checkpoints of the "
            "ranks that hold the same shard"
        )
    if first.moment_steps != other.moment_steps:
        raise StateError(
            f"the checkpoints are of different runs: moment_steps is {first.moment_steps} on rank 0, "
            f"{other.moment_steps} on rank {other.rank}"
        )
    unlike = [name for name, a in first.alignments.items() if other.alignments.get(name) != a]
    unlike += set(other.alignments) - set(first.alignments)
    if unlike:
        raise StateError(
            f"the checkpoints are of different runs: all ranks of a run have the same alignment of {unlike[0]!r}, "
            f"ranks 0 and {other.rank} have not"
        )
    for kind, a in first.memories.items():
        b = other.memories[kind]
        different = sorted(set(a) ^ set(b))
        if different:
            raise StateError(
                f"the checkpoints are of different models: only one of ranks 0 and {other.rank} "
                f"has the {kind} of {different}"
            )
        for name in a:
            shapes = {tuple(t.shape) for t in (a[name], b[name])} - {(0,)}
            if len(shapes) > 1:
                raise StateError(
                    f"{kind} of {name!r} has shape {tuple(a[name].shape)} on rank 0, "
                    f"{tuple(b[name].shape)} on rank {other.rank}"
                )


def _new_rank(old: Sequence[Checkpoint], rank: int, size: int) -> Checkpoint:
    sources = range(rank, len(old), size) if size < len(old) else [rank % len(old)]
    shared_by = len(range(rank % len(old), size, len(old))) if size >= len(old) else 1
    factor = size / len(old) / shared_by
    made = Checkpoint(old[0].step, rank, size, old[0].place, moment_steps=old[0].moment_steps)
    for kind, into in made.memories.items():
        weight = 1.0 / len(sources) if kind == "second_moment" else factor
        for source in sources:
            for name, t in old[source].memories[kind].items():
                if t.numel() or name not in into:
                    into[name] = t * weight + into[name] if name in into and into[name].numel() else t * weight
    if size == len(old):
        made.selectors = dict(old[rank].selectors)
        made.alignments = dict(old[rank].alignments)
    return made
