"""State dicts of a state: through torch.save and back, damaged in every way, and of a model that has changed."""

from __future__ import annotations

import copy
import io
import math
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.ddp import model as finding

MUTATIONS = 4000
Saved = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def path() -> str:
    """The kernel path in use: the default one alone, since no kernel reads a state dict."""
    return kernels.current_path()


@pytest.fixture(autouse=True)
def _world() -> None:
    sc.init()


def model_of(**layers: nn.Module) -> nn.Module:
    """A model whose gradients are given, never computed."""
    torch.manual_seed(1)
    return nn.ModuleDict(
        layers or {"a": nn.Linear(4, 6, dtype=torch.float32), "b": nn.Linear(6, 3, dtype=torch.float32)}
    )


def trained(model: nn.Module | None = None, steps: int = 3, **options: Any) -> sc.SparseState:
    model = model_of() if model is None else model
    options = {"collective": "allgather", "feedback": sc.AdamCorrection()} | options
    state = sc.SparseState(sc.ThresholdTopK(0.3), model=model, **options)
    step(model, state, steps)
    return state


def step(model: nn.Module, state: sc.SparseState, steps: int = 1) -> None:
    for i in range(steps):
        for j, p in enumerate(model.parameters()):
            p.grad = torch.linspace(-1.0, 1.0 + i + j, p.numel(), dtype=torch.float32).view_as(p)
        sc.allreduce_gradients(model, state)


def same(a: Saved, b: Saved) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].numpy().tobytes() == b[k].numpy().tobytes()
        for k in a
    )


def ahead() -> sc.SparseState:
    """A state whose state dict has entries of all kinds."""
    model = model_of()
    state = sc.SparseState(sc.ThresholdTopK(0.3), model=model, collective="allgather")
    sc.optim.AdamW(model.parameters(), state, lr=0.01)
    step(model, state, 3)
    return state


def test_a_state_dict_survives_torch_save_and_a_load_of_weights_only() -> None:
    state = ahead()
    saved = state.state_dict()
    kinds = {key.partition(".")[0] for key in saved}
    assert kinds >= {"step", "rank", "world_size", "residual", "velocity", "second_moment", "moment_steps"}
    assert kinds >= {"selector", "alignment"}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(loaded, saved)
    again = ahead()
    again.load_state_dict(loaded)
    assert same(again.state_dict(), saved)


def test_what_is_loaded_is_copied() -> None:
    state = trained()
    saved = state.state_dict()
    given = {key: t.clone().requires_grad_(t.is_floating_point()) for key, t in saved.items()}
    state.load_state_dict(given)
    for t in given.values():
        t.detach().zero_()
    assert same(state.state_dict(), saved)
    assert not any(t.requires_grad for t in state.state_dict().values())


# --- damage -------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**63,
    2.5,
    math.nan,
    "",
    "text",
    b"bytes",
    [],
    [1],
    {},
    {"a": 1},
    {"a": {"b": []}},
]
ODD += [
    object(),
    torch,
    sc.TopK(0.1),
    complex(1, 2),
    torch.float32,
    torch.Size([3]),
    [torch.zeros(2, dtype=torch.float32)],
]


def tensors(t: torch.Tensor, rng: random.Random) -> list[torch.Tensor]:
    """Tensors that look like a given one, most of them wrong."""
    floats = t.double()
    bad = floats.clone().reshape(-1)
    if bad.numel():
        bad[rng.randrange(bad.numel())] = rng.choice([math.nan, math.inf, -math.inf, -1.0, 0.5, 1e300, -0.0])
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64]
    return [
        t.to(rng.choice(dtypes)),
        bad.reshape(t.shape).to(t.dtype) if t.is_floating_point() else -t - 1,
        t.reshape(-1)[: rng.randrange(t.numel() + 1)],
        t.unsqueeze(0),
        t.expand(2, *t.shape),
        t.to("meta"),
        t.to_sparse() if t.dim() else t.to(torch.float64),
        torch.empty(0, dtype=t.dtype),
        torch.empty(0, 3, dtype=t.dtype),
        torch.tensor(rng.choice([0, 1, 2**53 + 1, 2**63 - 1, -1]), dtype=torch.int64),
        nn.Parameter(t.float()),
        torch.nested.nested_tensor([floats.reshape(-1), floats.reshape(-1)]),
        torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        t.as_subclass(type("Strange", (torch.Tensor,), {})),
    ]


def mutated(saved: Saved, rng: random.Random) -> tuple[Any, str]:
    """Returns a damaged state dict, and what was done to it."""
    made: dict[Any, Any] = dict(saved)
    key = rng.choice(sorted(saved))
    kind, _, name = key.partition(".")
    what = rng.randrange(9)
    if what == 0:
        del made[key]
    elif what == 1:
        made[key] = rng.choice(ODD)
    elif what <= 4:
        made[key] = rng.choice(tensors(saved[key], rng))
    elif what == 5:
        made[
            rng.choice([None, 1, 2.5, ("a",), b"step", "", ".", "residual", "residual.", "x.y", f"{key}.", f".{key}"])
        ] = made[key]
    elif what == 6:
        made[f"{rng.choice(['residual', 'velocity', 'selector', 'alignment', 'step', 'rank'])}.{name}"] = made[key]
    elif what == 7:
        made[rng.choice([key.upper(), f"{kind}._orig_mod.{name}", f"{kind}.{'f' * 16}", f"{kind}.-1"])] = made.pop(key)
    else:
        other = rng.choice(sorted(saved))
        made[key], made[other] = made[other], made[key]
    return made, f"{what}: {key}"


def refusal_of(state: sc.SparseState, made: Any, what: str) -> str | None:
    """Returns the StateError's text; None if the state dict was loaded."""
    try:
        state.load_state_dict(made)
    except sc.StateError as error:
        return str(error)
    except BaseException as error:
        raise AssertionError(f"{what}: {error!r}") from error
    return None


@pytest.mark.filterwarnings("ignore")  # torch's, of the kinds of tensors that nobody uses
@pytest.mark.parametrize("known", [True, False], ids=["a known model", "no model yet"])
def test_mutations_are_refused_by_name_or_load_whole(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "_registered", lambda state: [])  # the search through all live objects takes its time
    saved = ahead().state_dict()
    state = ahead() if known else sc.SparseState(sc.ThresholdTopK(0.3), feedback=sc.AdamCorrection())
    before = state.state_dict()
    rng = random.Random(7)
    outcomes: Counter[str] = Counter()
    start = time.process_time()
    for _ in range(MUTATIONS):
        made, what = mutated(saved, rng)
        refusal = refusal_of(state, made, what)
        outcomes["refused" if refusal else "loaded"] += 1
        if refusal:
            assert re.search(r"'|\b(step|rank|world_size|second_moment|moment_steps|keys)\b", refusal), (what, refusal)
            assert same(state.state_dict(), before), what
        else:
            before = state.state_dict()
    assert outcomes["refused"] > MUTATIONS // 3, outcomes
    assert outcomes["loaded"] > MUTATIONS // 50, outcomes
    assert time.process_time() - start < 60.0


@pytest.mark.parametrize(
    "given",
    [None, [], "text", 3, torch.zeros(3, dtype=torch.float32), [("step", torch.tensor(1, dtype=torch.int64))]],
    ids=repr,
)
@pytest.mark.parametrize(
    "call", [lambda d: trained().load_state_dict(d), lambda d: sc.reshard([d], 2)], ids=["load", "reshard"]
)
def test_what_is_no_dict_is_refused(given: Any, call: Callable[[Any], None]) -> None:
    with pytest.raises(sc.StateError, match=r"must be a dict of tensors, got"):
        call(given)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"step": torch.tensor(1.0, dtype=torch.float32)},
            r"'step' must be one whole number >= 0 as int64, got a float32 tensor of shape \(\): 1\.0",
        ),
        ({"step": torch.tensor(2**53 + 1, dtype=torch.int64)}, r"'step' must be one whole number"),
        ({"rank": torch.tensor(4, dtype=torch.int64)}, r"rank 0 of 1 was given the checkpoint of rank 4 of 1"),
        ({"moment_steps": torch.tensor(9, dtype=torch.int64)}, r"moment_steps = 9 are more than its step 3"),
        ({"moment_steps": None}, r"has second_moment, but no moment_steps"),
        (
            {"residual.a.weight": torch.zeros(6, 4, device="meta", dtype=torch.float32)},
            r"residual of 'a\.weight' is on the meta device",
        ),
        ({"residual.a.weight": {"nested": [1]}}, r"residual of 'a\.weight' must be a float32 tensor, got dict"),
        (
            {"velocity.a.weight": torch.zeros(4, 6, dtype=torch.float32)},
            r"velocity of 'a\.weight'.*different shapes.*\(4, 6\)",
        ),
        (
            {"velocity.a.bias": torch.full((6,), math.nan, dtype=torch.float32)},
            r"velocity of 'a\.bias' holds non-finite",
        ),
        (
            {"second_moment.a.bias": torch.full((6,), -1.0, dtype=torch.float32)},
            r"second_moment of 'a\.bias' holds negative",
        ),
        ({"selector.12": torch.zeros(3, dtype=torch.float64)}, r"'selector\.12' does not name a layout"),
        ({"alignment.zz": torch.ones(6, dtype=torch.float64)}, r"has the alignment of 'zz', unknown here"),
        ({"alignment.a.bias": torch.full((6,), 1.5, dtype=torch.float64)}, r"'alignment\.a\.bias' must hold ranks"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_entry_is_refused_by_name(change: Saved, expected: str) -> None:
    state = trained()
    before = state.state_dict()
    given = {key: value for key, value in (before | change).items() if value is not None}
    with pytest.raises(sc.StateError, match=expected):
        state.load_state_dict(given)
    assert same(state.state_dict(), before)


@pytest.mark.parametrize("key", ["moment_steps", "alignment.a.bias"])
def test_the_checkpoint_of_another_run_is_found_among_those_to_reshard(key: str) -> None:
    world = [
        ahead().state_dict()
        | {"rank": torch.tensor(rank, dtype=torch.int64), "world_size": torch.tensor(2, dtype=torch.int64)}
        for rank in range(2)
    ]
    assert len(sc.reshard(world, 3)) == 3
    world[1][key] = world[1][key] - 1 if key == "moment_steps" else world[1][key] * 2
    with pytest.raises(sc.StateError, match=rf"different runs.*{re.escape(key.partition('.')[2])}.*rank"):
        sc.reshard(world, 3)


# --- another model ------------------------------------------------------------------------------------------------


def renamed(saved: Saved, pattern: str, made: str) -> Saved:
    """A state dict with other names of parameters."""
    split = [(key.partition("."), t) for key, t in saved.items()]
    return {
        f"{k}{dot}{re.sub(pattern, made, name)}" if k != "selector" else f"{k}.{name}": t for (k, dot, name), t in split
    }


@pytest.mark.parametrize(
    ("pattern", "made", "hint"),
    [
        (r"^(?=.)", "module.", r"4 of its names are the model's without the prefix 'module\.'"),
        (r"^(?=.)", "model.inner.", r"without the prefix 'model\.inner\.'"),
        (r"^(?=[ab])", "_orig.", r"without the prefix '_orig\.'"),
        (r"\.(?=weight|bias)", ".base.", r"without the part 'base\.'"),
        (
            r"^a\.",
            "encoder.",
            r"2 of its names are the model's with|2 of its names are the model's 'encoder' became 'a'",
        ),
    ],
)
def test_a_mismatch_says_what_would_map_the_names(pattern: str, made: str, hint: str) -> None:
    state = trained()
    before = state.state_dict()
    for strict in (True, False) if "a" not in pattern.split("[")[0] else (True,):
        with pytest.raises(sc.StateError, match=hint):
            state.load_state_dict(renamed(before, pattern, made), strict=strict)
        assert same(state.state_dict(), before)


def test_a_mismatch_says_which_prefix_is_missing() -> None:
    saved = trained(model_of()).state_dict()
    state = trained(nn.ModuleDict({"model": model_of()}))
    with pytest.raises(
        sc.StateError, match=r"4 of its names are the model's with the prefix 'model\.': 'a\.bias' is 'model\.a\.bias'"
    ):
        state.load_state_dict(saved)


def test_a_mismatch_names_parameters_of_the_same_shapes_in_the_same_order() -> None:
    saved = trained(
        model_of(encoder=nn.Linear(4, 6, dtype=torch.float32), lower=nn.Linear(6, 3, dtype=torch.float32))
    ).state_dict()
    state = trained(model_of(first=nn.Linear(4, 6, dtype=torch.float32), second=nn.Linear(6, 3, dtype=torch.float32)))
    with pytest.raises(sc.StateError, match=r"same shapes: 'encoder\.bias' may be 'first\.bias'"):
        state.load_state_dict(saved)
    with pytest.raises(sc.StateError, match=r"it lacks the residual of[^;]*$"):
        trained(model_of(first=nn.Linear(5, 6, dtype=torch.float32))).load_state_dict(saved)


def test_a_mismatch_of_many_names_stays_readable() -> None:
    saved = trained(model_of(**{f"l{i:03}": nn.Linear(2, 2, dtype=torch.float32) for i in range(300)})).state_dict()
    with pytest.raises(sc.StateError, match=r"'l000\.bias'.* and 592 more") as caught:
        trained().load_state_dict(saved)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("when", ["the model is known", "the model comes later"])
def test_a_grown_model_loads_what_the_checkpoint_has(when: str) -> None:
    saved = trained(feedback=sc.MomentumCorrection()).state_dict()
    grown = model_of(
        a=nn.Linear(4, 6, dtype=torch.float32),
        b=nn.Linear(6, 3, dtype=torch.float32),
        c=nn.Linear(3, 2, dtype=torch.float32),
    )
    state = trained(grown, feedback=sc.MomentumCorrection())
    before = state.state_dict()
    with pytest.raises(sc.StateError, match=r"lacks the residual of 'c\.bias', 'c\.weight'; strict=False"):
        state.load_state_dict(saved)
    assert same(state.state_dict(), before)
    if when == "the model comes later":
        state = sc.SparseState(sc.ThresholdTopK(0.3), collective="allgather", feedback=sc.MomentumCorrection())
        state.load_state_dict(saved, strict=False)
        state._lookup._given_model = grown  # DDP would be found in its place
    else:
        state.load_state_dict(saved, strict=False)
    loaded = state.state_dict()
    memories = {key for key in saved if key.startswith(("residual.", "velocity."))}
    assert all(torch.equal(loaded[key], saved[key]) for key in memories)
    assert not any(loaded[key].any() for key in loaded if key.startswith(("residual.c", "velocity.c")))
    assert state.step == 3
    step(grown, state)
    assert state.state_dict()["residual.c.weight"].any()


def test_what_a_shrunk_model_loses_is_told_and_the_rest_is_loaded() -> None:
    saved = trained(feedback=sc.ErrorFeedback()).state_dict()
    state = trained(model_of(a=nn.Linear(4, 6, dtype=torch.float32)), feedback=sc.ErrorFeedback())
    lost = torch.cat([saved[k].reshape(-1) for k in ("residual.b.bias", "residual.b.weight")]).norm()
    before = state.state_dict()
    with pytest.raises(sc.StateError, match=r"has the residual of 'b\.bias', 'b\.weight', unknown here; strict=False"):
        state.load_state_dict(saved)
    with pytest.warns(
        UserWarning, match=rf"rank 0: the model lacks 'b\.bias', 'b\.weight'.*norm of {float(lost):.4g} of"
    ):
        state.load_state_dict(saved, strict=False)
    assert not same(state.state_dict(), before)
    loaded = state.state_dict()
    assert torch.equal(loaded["residual.a.weight"], saved["residual.a.weight"])
    assert not any(".b." in key for key in loaded)


def test_a_warning_made_an_error_leaves_the_state_as_it_was() -> None:
    state = trained(model_of(a=nn.Linear(4, 6, dtype=torch.float32)))
    before = state.state_dict()
    saved = trained().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="dropped"):
            state.load_state_dict(saved, strict=False)
    assert same(state.state_dict(), before)


def test_moments_of_adam_start_again_if_the_model_has_grown() -> None:
    """They count their steps together: a new parameter's second moment of zero would seem to be well measured."""
    saved = trained().state_dict()
    grown = model_of(
        a=nn.Linear(4, 6, dtype=torch.float32),
        b=nn.Linear(6, 3, dtype=torch.float32),
        c=nn.Linear(3, 2, dtype=torch.float32),
    )
    state = trained(grown)
    with pytest.warns(UserWarning, match=r"moments of Adam correction start again, since 'c\.bias', 'c\.weight'"):
        state.load_state_dict(saved, strict=False)
    loaded = state.state_dict()
    assert int(loaded["moment_steps"]) == 0
    assert not any(loaded[key].any() for key in loaded if key.startswith(("velocity", "second_moment")))
    assert torch.equal(loaded["residual.a.weight"], saved["residual.a.weight"])


def test_strictness_changes_nothing_for_the_same_model() -> None:
    state, saved = trained(), trained(steps=2).state_dict()
    state.load_state_dict(copy.deepcopy(saved), strict=False)
    assert same(state.state_dict(), saved)


def test_other_shapes_are_refused_even_so() -> None:
    saved = trained(model_of(a=nn.Linear(4, 5, dtype=torch.float32))).state_dict()
    with pytest.raises(sc.StateError, match=r"residual of 'a\.(weight|bias)' in the checkpoint has shape"):
        trained().load_state_dict(saved, strict=False)
