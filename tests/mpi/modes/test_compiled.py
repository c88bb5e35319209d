"""torch.compile: around DDP, inside it, with its optimizer, and with the reducer that cannot call hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from ledger import Ledger, lossless, sparse
from torch import nn
from training import flat, grad_of, loss_of, mlp, wrap

import sparsecomm as sc

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch.compile says of itself


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def deep() -> nn.Module:
    """Enough layers that the optimizer of torch.compile splits the graph at bucket borders."""
    torch.manual_seed(7)
    return nn.Sequential(
        *[m for _ in range(6) for m in (nn.Linear(12, 12, dtype=torch.float32), nn.Tanh())],
        nn.Linear(12, 3, dtype=torch.float32),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("optimize_ddp", ["ddp_optimizer", True, False])
@pytest.mark.parametrize("make", [mlp, deep])
def test_compiled_ddp_loses_nothing_and_equals_plain_ddp(
    world: sc.World, backend: str, optimize_ddp: Any, make: Callable[[], nn.Module]
) -> None:
    with torch._dynamo.config.patch(optimize_ddp=optimize_ddp):
        cap = {"bucket_cap_mb": 25 if optimize_ddp else 0.0005}
        ledger, ours, plain = Ledger(make(), sparse(), **cap), wrap(make(), lossless(), **cap), wrap(make(), None)
        compiled = [torch.compile(m, backend=backend) for m in (ledger.ddp, ours)]
        for step in range(4):
            ledger.step(partial(lambda s: loss_of(compiled[0], s).backward(), step))
            ledger.check()
            for ddp, run in ((ours, compiled[1]), (plain, plain)):
                ddp.zero_grad()
                loss_of(run, step).backward()
            torch.testing.assert_close(flat(ours, grad_of), flat(plain, grad_of), rtol=1e-4, atol=1e-6)
    assert ledger.state.step == 4
    assert ledger.kept_back > 0


def test_a_compiled_model_inside_ddp(world: sc.World) -> None:
    ledger = Ledger(torch.compile(mlp(), backend="aot_eager"), sparse(), bucket_cap_mb=25)
    for step in range(4):
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s).backward(), step))
        ledger.check()
    ledger.check_replicas()


@pytest.mark.parametrize("static_graph", [False, True])
def test_compiled_with_accumulation(world: sc.World, static_graph: bool) -> None:
    with torch._dynamo.config.patch(optimize_ddp=False):
        ledger = Ledger(mlp(), sparse(), static_graph=static_graph)
        compiled = torch.compile(ledger.ddp, backend="eager")
        for step in range(4):

            def backward(step: int = step) -> None:
                if step:
                    with ledger.ddp.no_sync():
                        loss_of(compiled, 100 + step).backward()
                loss_of(compiled, step).backward()

            ledger.step(backward)
            ledger.check()


def compiled_autograd() -> Any:
    return torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=False))


@pytest.mark.parametrize("autograd", [contextlib.nullcontext, compiled_autograd], ids=["usual", "compiled"])
def test_the_python_reducer_is_refused_at_the_first_backward(world: sc.World, autograd: Callable[[], Any]) -> None:
    """That reducer would ignore the hook's result, so that gradients would silently not be averaged."""
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        compiled = torch.compile(wrap(mlp(), sparse()), backend="aot_eager")
        with pytest.raises(Exception, match="Python reducer") as caught, autograd():
            loss_of(compiled, 0).backward()
    assert "optimize_ddp = 'ddp_optimizer'" in str(caught.value)
    error, kinds = caught.value, []
    while error is not None:
        kinds.append(type(error))
        error = error.__cause__ or error.__context__
    assert sc.ConfigError in kinds


def test_compiled_autograd_over_the_usual_reducer_is_refused_by_torch(world: sc.World) -> None:
    """It points to the Python reducer, which we refuse: compiled autograd cannot have comm hooks."""
    with torch._dynamo.config.patch(optimize_ddp=False):
        ddp = wrap(mlp(), sparse())
        with pytest.raises(RuntimeError, match="not compatible with C\\+\\+ DDP Reducer"), compiled_autograd():
            loss_of(ddp, 0).backward()
