"""Checks of the contract of `Compressor`, on which error feedback and all collectives rely."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecomm.compress import Compressor, Selection, SelectionBuffers
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.testing.errors import ContractError, attempt, refuse
from sparsecomm.testing.gradients import FINITE, NONFINITE, gradient
from sparsecomm.testing.simulated import check_exchange
from sparsecomm.types import GRAD_DTYPES

__all__ = ["ContractError", "check_compressor"]

_STEPS = (0, 1, 2, 3, 10, 100, 1000, 10**6)
_EPS = torch.finfo(torch.float32).eps
_TINY = 2.0**-148


@torch.inference_mode()
def check_compressor(
    compressor: Compressor,
    *,
    numels: Sequence[int] = (0, 1, 2, 7, 130, 3000),
    ranks: Sequence[int] = (1, 2, 3),
    steps: int = 4,
    seed: int = 0,
) -> None:
    """Checks a compressor: its options, its selections, and whole exchanges between simulated ranks. Takes seconds.

    Checks of `select`, for float32, float16 and bfloat16, empty and small buckets, and k from one to all elements:

    - Nothing is lost: selected values plus the new residual are the old residual plus the gradient.
    - Positions ascend and are in range, and the buffers are large enough.
    - NaN and infinity are never selected, and leave the residual unchanged.
    - The residual is zero where an element was selected, and the gradient is unchanged.
    - The same input gives the same selection, and buckets do not influence each other.

    Checks of exchanges between several ranks: nothing is lost, replicas agree bit for bit, and a NaN on one rank makes
    all ranks undo the step. All checks run in torch's inference mode, as training does.

    Args:
        compressor: an instance, with the options of its later use.
        numels: sizes of the buckets to try, in elements.
        ranks: world sizes to try.
        steps: number of steps in each bucket.
        seed: seed of the gradients.

    Raises:
        ContractError: an AssertionError that names the broken rule and the input.
    """
    _check_options(compressor, numels)
    for numel, dtype, kind in itertools.product(numels, GRAD_DTYPES, (*FINITE, *NONFINITE)):
        for k in _ks(compressor, numel):
            _check_bucket(compressor, _Inputs(numel, dtype, kind, k, seed), steps)
    for numel in numels:
        _check_schedule(compressor, numel, seed)
        _check_independence(compressor, numel, steps, seed)
    largest = max(numels, default=0)
    if largest:
        _check_liveness(compressor, largest, seed)
    for size, numel in itertools.product(ranks, numels):
        check_exchange(compressor, size, numel, steps, seed)


# --- options ------------------------------------------------------------------------------------------------------


def _check_options(compressor: Compressor, numels: Sequence[int]) -> None:
    if not isinstance(compressor, Compressor):
        hint = "; pass an instance, not the class" if isinstance(compressor, type) else ""
        refuse(f"{compressor!r} is not an instance of sparsecomm.Compressor{hint}")
    try:
        SparseConfig(compressor=compressor)
        for name in compressor.collectives:
            SparseConfig(compressor=compressor, collective=name)
    except ConfigError as error:
        raise ContractError(f"collectives = {compressor.collectives!r}: {error}") from error
    for step in _STEPS:
        density = attempt("density_at", functools.partial(compressor.density_at, step), f"step {step}")
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
            refuse(f"density_at({step}) returned {density!r}: it must be a number in (0, 1]")
        if compressor.density_at(step) != density:
            refuse(f"density_at({step}) returned {density!r}, then {compressor.density_at(step)!r}: ranks would differ")
        for numel in numels:
            k = attempt("k_for", functools.partial(compressor.k_for, numel, step), f"numel {numel}, step {step}")
            if isinstance(k, bool) or not isinstance(k, int) or not min(numel, 1) <= k <= numel:
                refuse(f"k_for({numel}, {step}) returned {k!r}: it must be an int in {min(numel, 1)} .. {numel}")
            _capacity(compressor, k, numel)


def _capacity(compressor: Compressor, k: int, numel: int) -> int:
    room = attempt("capacity", lambda: compressor.capacity(k, numel), f"k {k}, numel {numel}")
    if isinstance(room, bool) or not isinstance(room, int) or room < 0:
        refuse(f"capacity({k}, {numel}) returned {room!r}: it must be an int >= 0")
    return room


def _ks(compressor: Compressor, numel: int) -> list[int]:
    """Returns the values of k to try: those of the compressor itself, one, and all."""
    own = {compressor.k_for(numel, step) for step in (0, _STEPS[-1])}
    return sorted(own if compressor.is_dense else own | {min(numel, 1), numel})


# --- one bucket ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The inputs of some steps in one bucket.

    Attributes:
        numel: elements of the bucket.
        dtype: dtype of the gradients.
        kind: one of `FINITE` or `NONFINITE`.
        k: number of elements to select.
        seed: seed of the gradients.
    """

    numel: int
    dtype: torch.dtype
    kind: str
    k: int
    seed: int

    def gradient(self, step: int) -> torch.Tensor:
        """Returns the flat gradient of a step."""
        return gradient(self.kind_at(step), self.numel, self.dtype, self.seed + 1000 * step)

    def kind_at(self, step: int) -> str:
        """Returns the kind of gradient in a step. NaN comes in odd steps, when the residual is not empty."""
        return self.kind if self.kind in FINITE or step % 2 else "normal"

    def describe(self, step: int, scale: float) -> str:
        """Returns the input of a step in words, for messages."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.numel} elements, {dtype}, {self.kind_at(step)}, k = {self.k}, scale = {scale}, step {step}"


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a bucket: the residual before, the scaled gradient (float32), and the selected pairs."""

    before: torch.Tensor
    added: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor

    @property
    def sums(self) -> torch.Tensor:
        return self.before + self.added


@dataclass
class _Bucket:
    """A residual and a memory, and the checks of one step with them."""

    compressor: Compressor
    residual: torch.Tensor
    memory: SelectorMemory

    @classmethod
    def empty(cls, compressor: Compressor, numel: int) -> _Bucket:
        return cls(compressor, torch.zeros(numel, dtype=torch.float32), SelectorMemory())

    def step(self, grad: torch.Tensor, k: int, scale: float, case: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Selects, and checks the selection. Returns positions (int64) and values."""
        before, given = self.residual.clone(), grad.clone()
        room = _capacity(self.compressor, k, grad.numel())
        # Elements that `select` does not write must be recognizable as invalid.
        out = SelectionBuffers(
            torch.full((room,), 2**32 - 1, dtype=torch.uint32), torch.full((room,), torch.nan, dtype=torch.float32)
        )

        def select() -> Selection:
            return self.compressor.select(grad, self.residual, k, self.memory, out, scale=scale)

        done = attempt("select", select, case)
        if not isinstance(done, Selection):
            refuse(f"select returned {done!r}, not a Selection ({case})")
        for name, value in (("nnz", done.nnz), ("nonfinite", done.nonfinite)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                refuse(f"select returned {name} = {value!r}: it must be an int >= 0 ({case})")
        if done.nnz > room:
            refuse(f"select returned nnz = {done.nnz}, more than its own capacity({k}, ...) = {room} ({case})")
        if not _same_bits(grad, given):
            refuse(f"select changed the gradient, which is still needed if the step is undone ({case})")
        step = _Step(
            before,
            given.to(torch.float32) * scale,
            out.indices[: done.nnz].to(torch.int64),
            out.values[: done.nnz].clone(),
        )
        self._check_positions(step.indices, case)
        self._check_nonfinite(step, done.nonfinite, case)
        self._check_conservation(step, case)
        return step.indices, step.values

    def _check_positions(self, indices: torch.Tensor, case: str) -> None:
        numel = self.residual.numel()
        outside = indices[indices >= numel]
        if outside.numel():
            refuse(f"position {int(outside[0])} is out of range: the bucket has {numel} elements ({case})")
        falling = (indices[1:] <= indices[:-1]).nonzero().flatten()
        if falling.numel():
            i = int(falling[0])
            a, b = int(indices[i]), int(indices[i + 1])
            fault = "comes twice" if a == b else f"stands before {b}: positions must be strictly ascending"
            refuse(f"position {a} {fault} ({case})")

    def _check_nonfinite(self, step: _Step, reported: int, case: str) -> None:
        bad = ~torch.isfinite(step.sums)
        count = int(bad.sum())
        chosen = step.indices[bad[step.indices]]
        if chosen.numel():
            refuse(f"position {int(chosen[0])} was selected although NaN or infinite there ({case})")
        if not bool(torch.isfinite(step.values).all()):
            refuse(f"a selected value is {float(step.values[~torch.isfinite(step.values)][0])} ({case})")
        if reported != count:
            refuse(f"select reported nonfinite = {reported}, but {count} elements are NaN or infinite ({case})")
        if not _same_bits(self.residual[bad], step.before[bad]):
            refuse(f"the residual was changed where the sum is NaN or infinite: it must stay as it was ({case})")

    def _check_conservation(self, step: _Step, case: str) -> None:
        before, added = step.before, step.added
        expected = step.sums.double()
        expected = torch.where(torch.isfinite(expected), expected, before.double())
        out = self.residual.double()
        out[step.indices] += step.values.double()
        allowed = 4 * _EPS * (before.double().abs() + added.double().abs()) + _TINY
        wrong = ((out - expected).abs() > allowed) | ~torch.isfinite(out)
        wrong &= torch.isfinite(step.sums)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            sent = "selected" if bool((step.indices == i).any()) else "not selected"
            refuse(
                f"not conserved at position {i} ({sent}): residual {float(before[i]):.9g} + gradient "
                f"{float(added[i]):.9g} = {float(expected[i]):.9g} came in, but selected + residual is "
                f"{float(out[i]):.9g} ({case})"
            )
        left = step.indices[self.residual[step.indices] != 0]
        if left.numel():
            i = int(left[0])
            refuse(
                f"the residual at the selected position {i} is {float(self.residual[i]):.9g}: it must be zero there, "
                f"because undoing a step adds back exactly the selected values ({case})"
            )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _check_bucket(compressor: Compressor, inputs: _Inputs, steps: int) -> None:
    """Runs the same steps twice in new buckets; both runs must give the same result."""
    runs = []
    for _ in range(2):
        bucket, made = _Bucket.empty(compressor, inputs.numel), []
        for step in range(steps):
            scale = 1.0 if step % 2 == 0 else 0.5
            case = inputs.describe(step, scale)
            made.append((*bucket.step(inputs.gradient(step), inputs.k, scale, case), bucket.residual.clone(), case))
        runs.append(made)
    for first, second in zip(*runs, strict=True):
        if not all(_same_bits(a, b) for a, b in zip(first[:3], second[:3], strict=True)):
            refuse(
                "the same gradients gave another selection the second time, so a run could not be repeated; "
                f"draw random numbers from a seed and keep state in `memory` alone ({first[3]})"
            )


def _check_schedule(compressor: Compressor, numel: int, seed: int) -> None:
    """Checks the buffers' sizes while k changes from step to step."""
    bucket = _Bucket.empty(compressor, numel)
    for step in _STEPS:
        k = compressor.k_for(numel, step)
        grad = gradient("normal", numel, torch.float32, seed + step)
        bucket.step(grad, k, 1.0, f"{numel} elements, k = k_for({numel}, {step}) = {k}, after other k")


def _check_independence(compressor: Compressor, numel: int, steps: int, seed: int) -> None:
    """Checks that a bucket gives the same selections alone and in turns with another bucket."""

    def run(with_other: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        mine, other = _Bucket.empty(compressor, numel), _Bucket.empty(compressor, numel + 5)
        made = []
        for step in range(steps):
            k = compressor.k_for(numel, step)
            made.append(mine.step(gradient("normal", numel, torch.float32, seed + step), k, 1.0, f"step {step}"))
            if with_other:
                grad = 100 * gradient("wide", numel + 5, torch.float32, seed + step)
                other.step(grad, compressor.k_for(numel + 5, step), 1.0, f"step {step}, another bucket")
        return made

    for step, (alone, together) in enumerate(zip(run(False), run(True), strict=True)):
        if not all(_same_bits(a, b) for a, b in zip(alone, together, strict=True)):
            refuse(
                f"a bucket of {numel} elements is compressed differently in step {step} if another bucket comes in "
                "between: a compressor serves all buckets, so keep the state of a bucket in `memory`, not in `self`"
            )


def _check_liveness(compressor: Compressor, numel: int, seed: int) -> None:
    bucket, sent = _Bucket.empty(compressor, numel), 0
    for step in range(10):
        grad = gradient("normal", numel, torch.float32, seed + step)
        sent += bucket.step(grad, compressor.k_for(numel, step), 1.0, f"step {step}")[0].numel()
    if not sent:
        refuse(f"nothing was selected in 10 steps from a bucket of {numel} elements: the model would never train")
