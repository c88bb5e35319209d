"""Tensors that are no plain memory are refused by name: by the hook's layout, by hand, and by the parameter server."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsecomm as sc
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.runtime.kinds import tensor_problem


class Odd(torch.Tensor):
    """A subclass as anyone may write one."""


class OddParameter(nn.Parameter):
    """A parameter with a class of its own, as some libraries have them."""


def dtensor() -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(torch.ones(4, 3, dtype=torch.float32), init_device_mesh("cpu", (1,)), [Replicate()])


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(4, 3, dtype=torch.float32)


def nested() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch calls them a prototype
        return torch.nested.nested_tensor(
            [torch.ones(4, 3, dtype=torch.float32), torch.ones(2, 3, dtype=torch.float32)]
        )


def compressed() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch calls this layout beta
        return torch.ones(4, 3, dtype=torch.float32).to_sparse_csr()


KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "DTensor": (dtensor, "is a DTensor"),
    "fake": (fake, "is a FakeTensor"),
    "subclass": (lambda: torch.ones(4, 3, dtype=torch.float32).as_subclass(Odd), "is a Odd"),
    "meta": (lambda: torch.empty(4, 3, device="meta", dtype=torch.float32), "meta device"),
    "nested": (nested, "nested"),
    "COO": (lambda: torch.ones(4, 3, dtype=torch.float32).to_sparse(), "sparse_coo layout"),
    "CSR": (compressed, "sparse_csr layout"),
}


class Holder(nn.Module):
    """A plain parameter, and one of some kind."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.ones(4, dtype=torch.float32))
        self.strange = nn.Parameter(tensor)


@pytest.fixture(autouse=True)
def _world() -> None:
    sc.init()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_named(kind: str) -> None:
    make, named = KINDS[kind]
    model = Holder(make())
    problem = tensor_problem(model.strange)
    assert problem is not None
    assert named in problem
    with pytest.raises(sc.ConfigError, match=rf"parameter 'strange' .*{named}"):
        ModelLayout.of(model)
    state = sc.SparseState(sc.TopK(0.5), model=model)
    with pytest.raises(sc.ConfigError, match=rf"parameter 'strange' .*{named}"):
        sc.allreduce_gradients(model, state)


@pytest.mark.parametrize("kind", ["subclass", "COO"])
def test_a_gradient_of_another_kind_is_named(kind: str) -> None:
    make, named = KINDS[kind]
    model = Holder(torch.ones(4, 3, dtype=torch.float32))
    model.strange.grad = make()
    with pytest.raises(sc.ConfigError, match=rf"gradient of 'strange' .*{named}"):
        sc.allreduce_gradients(model, sc.SparseState(sc.TopK(0.5), model=model))


def test_a_quantized_tensor_is_named() -> None:
    with warnings.catch_warnings(action="ignore"):  # torch announces their end
        tensor = torch.quantize_per_tensor(torch.ones(4, dtype=torch.float32), 0.1, 0, torch.qint8)
    assert tensor_problem(tensor) == "is a quantized tensor"


def test_parameters_with_a_class_of_their_own_are_plain() -> None:
    model = Holder(torch.ones(4, 3, dtype=torch.float32))
    model.strange = OddParameter(torch.ones(4, 3, dtype=torch.float32))
    (model.strange.sum() + model.plain.sum()).backward()
    sc.allreduce_gradients(model, sc.SparseState(sc.TopK(1.0), model=model))
    assert torch.equal(model.strange.grad, torch.ones(4, 3, dtype=torch.float32))
