"""Checks of a model under FSDP2, and of the state that averages it over its replicas."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from sparsecomm.ddp.state import SparseState
from sparsecomm.errors import ConfigError
from sparsecomm.runtime.names import named_plainly
from sparsecomm.runtime.shards import WHOLE, Place, place_of

__all__ = ["check_layout", "check_replicas", "check_state", "parameter_groups"]

_MESH = 'fully_shard(module, mesh=mesh["shard"])'


def parameter_groups(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Returns the modules of a model under `fully_shard`, each with torch's parameter group.

    Raises:
        ConfigError: if there are none, one has several groups, or one has an all-reduce hook already.
    """
    from torch.distributed.fsdp import FSDPModule

    found: list[tuple[Any, Any]] = []
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        inner: Any = module._get_fsdp_state()  # torch has no public way to the groups
        groups = getattr(inner, "_fsdp_param_groups", None) or [g for g in [inner._fsdp_param_group] if g is not None]
        if len(groups) > 1:
            raise ConfigError(f"module {name!r} has {len(groups)} parameter groups on different meshes: not supported")
        if any(g._all_reduce_hook is not None for g in groups):
            raise ConfigError(
                f"module {name!r} has an all-reduce hook already: average_replicas is called once for a model, whose "
                "state then serves it for good (state.update changes its options)"
            )
        found += [(module, g) for g in groups]
    if not found:
        raise ConfigError(
            f"average_replicas needs a model under fully_shard, got {type(model).__name__} without any; write {_MESH}, "
            "or use DistributedDataParallel with sparse_hook for a model that every rank holds whole"
        )
    return found


def check_layout(model: torch.nn.Module) -> None:
    """Checks that all parameters of a model are sharded alike, on a mesh of one dimension.

    Raises:
        ConfigError: if they are not; names a parameter and its mesh.
    """
    places: dict[Place, str] = {}
    for name, parameter in named_plainly(model):
        p: Any = parameter  # a DTensor, which has more than a parameter
        mesh: Any = getattr(p, "device_mesh", None)
        if mesh is None:
            raise ConfigError(
                f"parameter {name!r} is not under fully_shard, so nothing would average it: apply fully_shard to the "
                "whole model too, without ignored_params, and call average_replicas between steps"
            )
        if place_of(p) == WHOLE and mesh.size() > 1:
            raise ConfigError(
                f"parameter {name!r} lies on a mesh of shape {tuple(mesh.shape)} with dimensions "
                f"{mesh.mesh_dim_names}, on which torch averages over the replicas itself; shard on one dimension "
                f"alone: {_MESH}"
            )
        if mesh.size() > 1 and not p.placements[0].is_shard(dim=0):
            raise ConfigError(f"parameter {name!r} has {p.placements}, but only rows are supported: Shard(0)")
        places.setdefault(place_of(p), name)
    if len(places) > 1:
        told = ", ".join(f"{place} of {name!r}" for place, name in places.items())
        raise ConfigError(f"all modules of a model must be sharded over the same mesh, but this rank holds {told}")


def check_state(model: torch.nn.Module, state: SparseState) -> None:
    """Checks that a state is one for this model.

    Raises:
        ConfigError: if it is not.
    """
    if not isinstance(state, SparseState):
        raise ConfigError(f"average_replicas needs a SparseState, got {state!r}; write sparsecomm.SparseState(...)")
    if state.module() is not model:
        other = "of no model" if state.module() is None else f"of another {type(state.module()).__name__}"
        raise ConfigError(
            f"this SparseState is {other}: make it with SparseState(..., model=model, "
            'process_group=mesh["replica"].get_group()) after fully_shard'
        )
    known = state.wrapped_model()
    if any(id(p) not in known.names for p in model.parameters()):
        raise ConfigError("fully_shard has replaced the parameters of this SparseState's model: make it afterwards")


def check_replicas(state: SparseState) -> None:
    """Checks that the ranks of a state hold the same shard of the same model. Collective over them.

    Raises:
        ConfigError: on all of these ranks, if they do not; names two ranks.
    """
    known = state.wrapped_model()
    text = repr(sorted((name, shape) for name, shape in known.shapes.items())).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
    device = "cpu" if "cpu" in known.averaging.devices else next(iter(known.averaging.devices), "cpu")
    mine = torch.tensor([*known.place, digest], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(known.size)]
    dist.all_gather(gathered, mine, group=known.averaging.group)
    first, *others = [t.tolist() for t in gathered]
    for rank, (shard, shards, shapes) in enumerate(others, start=1):
        if [shard, shards] != first[:2]:
            raise ConfigError(
                f"in the state's process group of {known.size} ranks, rank 0 holds {Place(*first[:2])} and rank {rank} "
                f"{Place(shard, shards)}, and averaging would mix them: pass "
                'process_group=mesh["replica"].get_group() to SparseState'
            )
        if shapes != first[2]:
            raise ConfigError(f"ranks 0 and {rank} of the state's process group hold models with other parameters")
