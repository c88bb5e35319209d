"""The model that a state averages gradients for: its DDP wrappers, parameter names and process group."""

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
from sparsecomm.runtime.names import localized, named_plainly
from sparsecomm.runtime.shards import WHOLE, Place, local_part, place_of

__all__ = ["Averaging", "ModelLookup", "WrappedModel", "Wrappers", "find_wrappers"]


@dataclass(frozen=True, slots=True)
class Averaging:
    """The ranks that average the gradients of a model.

    Attributes:
        ranks: their ranks in the world, in the order of their process group; None for the whole world in order.
        group: their process group; None for the default one.
        devices: types of the devices on which the process group can sum.
    """

    ranks: tuple[int, ...] | None
    group: dist.ProcessGroup | None
    devices: frozenset[str]


@dataclass(frozen=True, slots=True)
class Wrappers:
    """The DDP models that a state is registered with, and the ranks that average.

    Attributes:
        ddps: DDP models whose comm hook has this state; several if the script wrapped one model several times.
        members: world ranks of the process group, in its order.
        averaging: the same ranks, as the engine and torch.distributed take them.
    """

    ddps: list[DistributedDataParallel]
    members: tuple[int, ...]
    averaging: Averaging


@dataclass(slots=True)
class WrappedModel:
    """The model that a state averages gradients for.

    Attributes:
        names: parameter names by `id(parameter)`, without what DDP and other wrappers add: as in the plain state dict.
        shapes: shapes by name of the parts of parameters that this rank holds, frozen parameters included.
        trainable: names of the parameters that require a gradient.
        numel: elements of these parts.
        place: this rank's place among the shards of the model; `WHOLE` if it is not sharded.
        averaging: the ranks that average.
        rank: this rank within the group.
        size: number of ranks in the group.
        may_skip: whether DDP accepts parameters that a step does not use.
        ddps: weak references to the DDP wrappers, usually one; empty without DDP.
    """

    names: dict[int, str]
    shapes: dict[str, tuple[int, ...]]
    trainable: set[str]
    numel: int
    place: Place
    averaging: Averaging
    rank: int
    size: int
    may_skip: bool
    ddps: tuple[Callable[[], DistributedDataParallel | None], ...]

    @classmethod
    def of(cls, wrappers: Wrappers, model: torch.nn.Module | None, rank: int) -> WrappedModel:
        """Reads names, shapes and ranks from the wrappers and the model.

        Args:
            wrappers: result of `find_wrappers`.
            model: the model that the user gave; None takes the wrapped one.
            rank: this rank in the world.

        Raises:
            ConfigError: if several models share the state, or a DDP option cannot work with comm hooks.
        """
        ddps, members = wrappers.ddps, wrappers.members
        different = {(id(d.module), id(d.process_group)) for d in ddps}
        if len(different) > 1:
            raise ConfigError(f"one SparseState is registered with {len(different)} DDP models; each needs its own")
        if any(getattr(d, "skip_all_reduce_unused_params", False) for d in ddps):
            raise ConfigError(
                "DDP(skip_all_reduce_unused_params=True) skips the hook for some buckets, which hides the end of a "
                "step; find_unused_parameters=True alone works"
            )
        model = ddps[0] if model is None and ddps else model
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        named = [] if inner is None else _named(inner, ddps)
        places = {place_of(p) for _, p in named}
        return cls(
            names={id(p): name for name, p in named},
            shapes={name: () if p.is_nested else tuple(local_part(p).shape) for name, p in named},  # refused later
            trainable={name for name, p in named if p.requires_grad},
            numel=sum(local_part(p).numel() for _, p in named),
            place=places.pop() if len(places) == 1 else WHOLE,
            averaging=wrappers.averaging,
            rank=members.index(rank),
            size=len(members),
            may_skip=not ddps or any(d.find_unused_parameters or d.static_graph for d in ddps),
            ddps=tuple(weakref.ref(d) for d in ddps),
        )

    def is_gone(self) -> bool:
        """Returns whether the script has dropped all DDP wrappers of this model."""
        return bool(self.ddps) and all(d() is None for d in self.ddps)

    def name_of(self, parameter: torch.Tensor, prefix: str) -> str:
        """Returns a parameter's name.

        Raises:
            ConfigError: if the parameter is not in the model, or the model is unknown; the text starts with `prefix`.
        """
        if not self.names:
            raise ConfigError(
                f"{prefix}: the model of this SparseState is unknown; register the state with "
                "ddp.register_comm_hook(state, sparse_hook) or pass model= to SparseState"
            )
        name = self.names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"{prefix}: a parameter of shape {tuple(parameter.shape)} is not in the state's model: one SparseState "
                "serves one model, whose parameters may not be replaced once DDP has wrapped it"
            )
        return name

    def check_join(self) -> None:
        """Checks the options of an active `ddp.join()`.

        Raises:
            ConfigError: if Join asks for the average over the ranks that still have data; comm hooks never learn
                their number.
        """
        ddps: list[Any] = [d() for d in self.ddps]
        if any(d and d._join_config.enable and not getattr(d, "_divide_by_initial_world_size", True) for d in ddps):
            raise ConfigError(
                "join(divide_by_initial_world_size=False) is not supported: comm hooks are not told how many ranks "
                "still have data; use divide_by_initial_world_size=True"
            )


class ModelLookup:
    """Looks up the model of one state, and remembers it.

    Methods take the state as an argument: an attribute would make a reference cycle with it.

    Args:
        model: the model that the user gave, DDP or plain; None to search for the DDP model.
        group: the process group that the user gave; None takes DDP's, or the whole world without DDP.

    Attributes:
        model: the model as last found; None before the first successful look-up.
    """

    def __init__(self, model: torch.nn.Module | None, group: dist.ProcessGroup | None) -> None:
        self.model: WrappedModel | None = None
        self._given_model = model
        self._given_group = group
        self._last_step = -1  # step of the last look-up that changed buckets caused

    def must_look(self, step: int, *, changed: bool) -> bool:
        """Returns whether the model must be looked up: at first, when it is gone, and when it may be another one.

        Changed buckets are a sign of another model, but a rebuild of DDP's buckets looks the same. They therefore
        cause at most one look-up a step.

        Args:
            step: training step.
            changed: whether the bucket at hand has other parameters than before.
        """
        if self.model is None or self.model.is_gone():
            return True
        if not self.model.ddps or self._last_step == step or not changed:
            return False
        self._last_step = step
        return True

    def find(self, state: object, here: World) -> Wrappers:
        """Returns the state's DDP models and the ranks that average; raises as `find_wrappers` does."""
        return find_wrappers(state, self._given_model, self._given_group, here)

    def module(self, state: object, here: World) -> torch.nn.Module | None:
        """Returns the plain model, without a DDP wrapper; None if there is none so far."""
        model = self._given_model
        if model is None:
            ddps = self.find(state, here).ddps
            model = ddps[0] if ddps else None
        return model.module if isinstance(model, DistributedDataParallel) else model

    def attach(self, state: object, here: World, wrappers: Wrappers | None = None) -> WrappedModel:
        """Returns the state's model, and remembers it once its parameter names are known.

        Args:
            state: the `SparseState`.
            here: this process.
            wrappers: result of `find`; None keeps the known model, or looks up wrappers if there is none.

        Raises:
            ConfigError: as `find_wrappers` and `WrappedModel.of`.
        """
        if wrappers is None:
            if self.model is not None and not self.model.is_gone():
                return self.model
            wrappers = self.find(state, here)
        if self.model is not None and not wrappers.ddps:
            return self.model  # the script has dropped its DDP model, but a checkpoint still needs the names
        found = WrappedModel.of(wrappers, self._given_model, here.rank)
        if found.names:
            self.model = found
        return found


def _named(model: torch.nn.Module, ddps: list[DistributedDataParallel]) -> list[tuple[str, torch.Tensor]]:
    """Returns the model's parameters by plain name but for those that DDP leaves out, and those that it reduces."""
    left_out = {id(p) for d in ddps for name, p in d.module.named_parameters() if name in d.parameters_to_ignore}
    named: list[tuple[str, torch.Tensor]] = [(name, p) for name, p in named_plainly(model) if id(p) not in left_out]
    known = {id(p) for _, p in named}
    for ddp in ddps:
        named += localized(model, [p for p in ddp._module_parameters if id(p) not in known])
        known |= {id(p) for _, p in named}
    return named


def find_wrappers(
    state: object, model: torch.nn.Module | None, group: dist.ProcessGroup | None, here: World
) -> Wrappers:
    """Finds the DDP models that a state is registered with, and the ranks that average. Not collective.

    DDP tells a hook neither the model nor the names of its parameters. The search therefore goes through all live
    objects for DDP models whose list of comm hooks holds this state. Passing the DDP model to the state avoids it.

    Args:
        state: the `SparseState`.
        model: the model that the user gave, if any.
        group: the process group that the user gave; None takes DDP's, or the whole world without DDP.
        here: this process.

    Raises:
        ConfigError: if this rank is not in the group, so that no other rank would join its exchange.
    """
    ddps = [model] if isinstance(model, DistributedDataParallel) else _registered(state)
    if group is None and ddps:
        group = ddps[0].process_group
    if group is None:
        members = tuple(range(here.size))
    elif not isinstance(group, dist.ProcessGroup):  # new_group returns a number to ranks outside the group
        members = ()
    else:
        members = tuple(dist.get_process_group_ranks(group))
    if here.rank not in members:
        of = f", ranks {list(members)}" if members else ""
        raise ConfigError(f"rank {here.rank} is not in the process group of its SparseState{of}")
    ranks = None if members == tuple(range(here.size)) else members
    return Wrappers(ddps, members, Averaging(ranks, group, _devices(group)))


def _devices(group: dist.ProcessGroup | None) -> frozenset[str]:
    """Returns the types of the devices for which a process group has a backend."""
    found = dist.group.WORLD if group is None else group
    return frozenset() if found is None else frozenset(d.type for d in found._device_types)


def _registered(state: object) -> list[DistributedDataParallel]:
    found = _scan(state)
    if len(found) > 1:
        del found  # these references may keep a garbage model alive that only a reference cycle holds otherwise
        gc.collect()
        found = _scan(state)
    if not found and gc.get_freeze_count():
        # gc.get_objects() does not list a frozen heap, and freezing it before a fork is common advice.
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
