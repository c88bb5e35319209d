"""Wrappers around layers do not change a parameter's name, so a checkpoint fits with and without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import sparsecomm as sc
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.runtime.names import named_plainly, plain_name


class Inner(nn.Module):
    """Has a layer called "module" of its own, which is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 3, dtype=torch.float32)


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6, dtype=torch.float32), nn.Tanh(), Inner())


def checkpointed() -> nn.Module:
    model = plain()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
    return model


def compiled() -> nn.Module:
    model = plain()
    return nn.Sequential(*(torch.compile(layer, backend="eager") for layer in model))


MODELS = {"plain": plain, "checkpointed": checkpointed, "compiled": compiled}
NAMES = ["0.weight", "0.bias", "2.module.weight", "2.module.bias"]


def trained(model: nn.Module) -> sc.SparseState:
    state = sc.SparseState(sc.TopK(0.3), model=model, collective="allgather", feedback=sc.AdamCorrection())
    for p in model.parameters():
        p.grad = torch.linspace(-1.0, 1.0, p.numel(), dtype=torch.float32).view_as(p)
    sc.allreduce_gradients(model, state)
    return state


@pytest.fixture(autouse=True)
def _world() -> None:
    sc.init()


@pytest.mark.parametrize("kind", MODELS)
def test_names_are_those_of_the_plain_model(kind: str) -> None:
    assert [name for name, _ in named_plainly(MODELS[kind]())] == NAMES
    assert list(ModelLayout.of(MODELS[kind]()).names) == NAMES


@pytest.mark.parametrize("after", MODELS)
@pytest.mark.parametrize("before", MODELS)
def test_a_checkpoint_fits_with_and_without_wrappers(before: str, after: str) -> None:
    saved = trained(MODELS[before]()).state_dict()
    resumed = trained(MODELS[after]())
    resumed.load_state_dict(copy.deepcopy(saved))
    loaded = resumed.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_a_checkpoint_with_names_of_wrappers_loads() -> None:
    """As versions wrote it that kept them."""
    saved = trained(plain()).state_dict()
    old = {key.replace(".0.", ".0._checkpoint_wrapped_module."): t for key, t in saved.items()}
    assert old.keys() != saved.keys()
    state = trained(plain())
    state.load_state_dict(old)
    assert torch.equal(state.state_dict()["residual.0.weight"], saved["residual.0.weight"])
    twice = {**saved, "residual._orig_mod.0.weight": saved["residual.0.weight"]}
    with pytest.raises(sc.StateError, match=r"residual of '0\.weight' twice"):
        state.load_state_dict(twice)


def test_other_parts_of_a_name_stay() -> None:
    assert plain_name("module._orig_mod.a.module.b") == "module.a.module.b"
    assert plain_name("_orig_model.w") == "_orig_model.w"
