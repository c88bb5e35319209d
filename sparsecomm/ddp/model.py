"""What a state finds out about the model it serves: its DDP wrapper, its parameters' names, its process group."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sparsecomm.errors import ConfigError
from sparsecomm.launch import World

__all__ = ["WrappedModel", "Wrappers", "find_wrappers"]


@dataclass(frozen=True, slots=True)
class Wrappers:
    """The DDP models a state is registered with, and the ranks that average: known before anything can be told to them.

    Attributes:
        ddps: DDP models whose comm hook has this state; more than one if they wrap the same model, one after another.
        members: world ranks of the process group, in its order.
        ranks: the same for the engine: None if that is the whole world in order.
    """

    ddps: list[DistributedDataParallel]
    members: tuple[int, ...]
    ranks: tuple[int, ...] | None


@dataclass(slots=True)
class WrappedModel:
    """The model a state serves.

    Attributes:
        names: parameter names by id, without DDP's "module." so that they fit the plain model's state dict.
        shapes: shapes by name, of parameters and of frozen ones.
        trainable: names of the parameters that require a gradient.
        numel: elements of all its parameters.
        ranks: world ranks of its process group; None if that is the world.
        rank: this rank in the group.
        size: ranks of the group.
        may_skip: whether DDP lets parameters go unused in a step.
        ddps: its wrappers, usually one; none without DDP. Not kept alive.
    """

    names: dict[int, str]
    shapes: dict[str, tuple[int, ...]]
    trainable: set[str]
    numel: int
    ranks: tuple[int, ...] | None
    rank: int
    size: int
    may_skip: bool
    ddps: tuple[Callable[[], DistributedDataParallel | None], ...]

    @classmethod
    def of(cls, wrappers: Wrappers, model: torch.nn.Module | None, rank: int) -> WrappedModel:
        """Joins what is known.

        Args:
            wrappers: see `find_wrappers`.
            model: given by the user; None takes that of the wrapper.
            rank: this rank in the world.

        Raises:
            ConfigError: if several models share the state, or DDP was told what no hook can follow.
        """
        ddps, members = wrappers.ddps, wrappers.members
        different = {(id(d.module), id(d.process_group)) for d in ddps}
        if len(different) > 1:
            raise ConfigError(f"one SparseState is registered with {len(different)} DDP models; each needs its own")
        if any(getattr(d, "skip_all_reduce_unused_params", False) for d in ddps):
            raise ConfigError(
                "DDP(skip_all_reduce_unused_params=True) skips the hook for some buckets, so that a step's end is not "
                "known; find_unused_parameters=True alone works"
            )
        model = ddps[0] if model is None and ddps else model
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        named = [] if inner is None else list(inner.named_parameters())
        return cls(
            names={id(p): name for name, p in named},
            shapes={name: tuple(p.shape) for name, p in named},
            trainable={name for name, p in named if p.requires_grad},
            numel=sum(p.numel() for _, p in named),
            ranks=wrappers.ranks,
            rank=members.index(rank),
            size=len(members),
            may_skip=not ddps or any(d.find_unused_parameters or d.static_graph for d in ddps),
            ddps=tuple(weakref.ref(d) for d in ddps),
        )

    def is_gone(self) -> bool:
        """Returns whether the script has dropped all its wrappers."""
        return bool(self.ddps) and all(d() is None for d in self.ddps)

    def name_of(self, parameter: torch.Tensor, where: str) -> str:
        """Returns a parameter's name.

        Raises:
            ConfigError: if it is not in the model, or the model is not known; starts with `where`.
        """
        if not self.names:
            raise ConfigError(
                f"{where}: the model of this SparseState is unknown; register the state with "
                "ddp.register_comm_hook(state, sparse_hook) or pass model= to SparseState"
            )
        name = self.names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"{where}: a parameter of shape {tuple(parameter.shape)} is not in the state's model; "
                "one SparseState serves one model"
            )
        return name

    def check_join(self) -> None:
        """Checks what Join was told.

        Raises:
            ConfigError: if the average is to be over the ranks that still have data: no comm hook is told their number.
        """
        ddps: list[Any] = [d() for d in self.ddps]
        if any(d and d._join_config.enable and not getattr(d, "_divide_by_initial_world_size", True) for d in ddps):
            raise ConfigError(
                "join(divide_by_initial_world_size=False) is not supported: comm hooks are not told how many ranks "
                "still have data; use divide_by_initial_world_size=True"
            )


def find_wrappers(
    state: object, model: torch.nn.Module | None, group: dist.ProcessGroup | None, here: World
) -> Wrappers:
    """Finds the DDP models with this state and the ranks that average. Not collective.

    DDP tells a hook neither the model nor the names of the parameters, so the one list that joins them is looked
    up among live objects, once per state. Passing the DDP model to the state avoids it.

    Args:
        state: the `SparseState`.
        model: given by the user.
        group: given by the user; None takes that of DDP, or the world.
        here: this process.

    Raises:
        ConfigError: if this rank is not in the group: nobody else takes part in what it tries to do.
    """
    ddps = [model] if isinstance(model, DistributedDataParallel) else _registered(state)
    if group is None and ddps:
        group = ddps[0].process_group
    if group is None:
        members = tuple(range(here.size))
    elif not isinstance(group, dist.ProcessGroup):  # a number, which new_group gives those outside
        members = ()
    else:
        members = tuple(dist.get_process_group_ranks(group))
    if here.rank not in members:
        of = f", ranks {list(members)}" if members else ""
        raise ConfigError(f"rank {here.rank} is not in the process group of its SparseState{of}")
    return Wrappers(ddps, members, None if members == tuple(range(here.size)) else members)


def _registered(state: object) -> list[DistributedDataParallel]:
    found = _scan(state)
    if len(found) > 1:
        del found  # one of them may be garbage that only these references and its own cycles hold
        gc.collect()
        found = _scan(state)
    if not found and gc.get_freeze_count():
        # A frozen heap (common advice before workers fork) is not listed.
        gc.unfreeze()
        found = _scan(state)
        gc.freeze()
    return found


def _scan(state: object) -> list[DistributedDataParallel]:
    found = []
    for candidate in gc.get_objects():
        if issubclass(type(candidate), DistributedDataParallel):
            hooks: list[tuple[Any, object]] = getattr(candidate, "_comm_hooks", [])
            if any(s is state for _, s in hooks):
                found.append(candidate)
    return found
