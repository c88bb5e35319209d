"""Whether a compressor keeps the contract of `Compressor`, on which error feedback and every collective rely."""

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
from sparsecomm.testing.errors import ContractError, refuse, told
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
    """Checks a compressor: its options, what it selects, and whole exchanges between simulated ranks. Takes seconds.

    Nothing is lost (what is selected plus what stays is what came in), positions ascend and are in range, buffers
    suffice, NaN and infinity are never selected and leave the residual alone, what is selected is zero in the residual,
    the gradient is left alone, the same input gives the same selection, buckets do not disturb each other; for
    float32, float16 and bfloat16, buckets of no elements and of few, k from one to all. Then several ranks exchange
    with it, as in training: nothing is lost, replicas agree bit for bit, and a NaN on one rank is undone on all. All of
    it in torch's inference mode, as in training.

    Args:
        compressor: an instance, with the options that it will be used with.
        numels: elements of the buckets to try.
        ranks: sizes of the simulated worlds to try.
        steps: steps in each bucket, one after another.
        seed: of the gradients.

    Raises:
        ContractError: an AssertionError that says what is broken, for which input.
    """
    _check_options(compressor, numels)
    for numel, dtype, kind in itertools.product(numels, GRAD_DTYPES, (*FINITE, *NONFINITE)):
        for k in _ks(compressor, numel):
            _check_bucket(compressor, numel, dtype, kind, k, steps, seed)
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
        density = told("density_at", functools.partial(compressor.density_at, step), f"step {step}")
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
            refuse(f"density_at({step}) returned {density!r}: it must be a number in (0, 1]")
        if compressor.density_at(step) != density:
            refuse(f"density_at({step}) returned {density!r}, then {compressor.density_at(step)!r}: ranks would differ")
        for numel in numels:
            k = told("k_for", functools.partial(compressor.k_for, numel, step), f"numel {numel}, step {step}")
            if isinstance(k, bool) or not isinstance(k, int) or not min(numel, 1) <= k <= numel:
                refuse(f"k_for({numel}, {step}) returned {k!r}: it must be an int in {min(numel, 1)} .. {numel}")
            _capacity(compressor, k, numel)


def _capacity(compressor: Compressor, k: int, numel: int) -> int:
    room = told("capacity", lambda: compressor.capacity(k, numel), f"k {k}, numel {numel}")
    if isinstance(room, bool) or not isinstance(room, int) or room < 0:
        refuse(f"capacity({k}, {numel}) returned {room!r}: it must be an int >= 0")
    return room


def _ks(compressor: Compressor, numel: int) -> list[int]:
    """The k to try: what it wants itself, one, and all."""
    own = {compressor.k_for(numel, step) for step in (0, _STEPS[-1])}
    return sorted(own if compressor.is_dense else own | {min(numel, 1), numel})


# --- one bucket ---------------------------------------------------------------------------------------------------


@dataclass
class _Bucket:
    """A residual and a memory, and all checks of one step in them."""

    compressor: Compressor
    residual: torch.Tensor
    memory: SelectorMemory

    @classmethod
    def empty(cls, compressor: Compressor, numel: int) -> _Bucket:
        return cls(compressor, torch.zeros(numel), SelectorMemory())

    def step(self, grad: torch.Tensor, k: int, scale: float, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Selects; returns positions (int64) and values."""
        before, given = self.residual.clone(), grad.clone()
        room = _capacity(self.compressor, k, grad.numel())
        # What is not written must not pass for a selection.
        out = SelectionBuffers(torch.full((room,), 2**32 - 1, dtype=torch.uint32), torch.full((room,), torch.nan))

        def select() -> Selection:
            return self.compressor.select(grad, self.residual, k, self.memory, out, scale=scale)

        done = told("select", select, where)
        if not isinstance(done, Selection):
            refuse(f"select returned {done!r}, not a Selection ({where})")
        for name, value in (("nnz", done.nnz), ("nonfinite", done.nonfinite)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                refuse(f"select returned {name} = {value!r}: it must be an int >= 0 ({where})")
        if done.nnz > room:
            refuse(f"select returned nnz = {done.nnz}, more than its own capacity({k}, ...) = {room} ({where})")
        if not _same_bits(grad, given):
            refuse(f"select changed the gradient, which is still needed if the step is undone ({where})")
        indices, values = out.indices[: done.nnz].to(torch.int64), out.values[: done.nnz].clone()
        step = given.to(torch.float32) * scale
        self._check_positions(indices, where)
        self._check_nonfinite(before, step, indices, values, done.nonfinite, where)
        self._check_books(before, step, indices, values, where)
        return indices, values

    def _check_positions(self, indices: torch.Tensor, where: str) -> None:
        numel = self.residual.numel()
        outside = indices[indices >= numel]
        if outside.numel():
            refuse(f"position {int(outside[0])} is out of range: the bucket has {numel} elements ({where})")
        falling = (indices[1:] <= indices[:-1]).nonzero().flatten()
        if falling.numel():
            i = int(falling[0])
            a, b = int(indices[i]), int(indices[i + 1])
            what = "comes twice" if a == b else f"stands before {b}: positions must be strictly ascending"
            refuse(f"position {a} {what} ({where})")

    def _check_nonfinite(
        self,
        before: torch.Tensor,
        step: torch.Tensor,
        indices: torch.Tensor,
        values: torch.Tensor,
        reported: int,
        where: str,
    ) -> None:
        bad = ~torch.isfinite(before + step)
        count = int(bad.sum())
        chosen = indices[bad[indices]]
        if chosen.numel():
            refuse(f"position {int(chosen[0])} was selected although NaN or infinite there ({where})")
        if not bool(torch.isfinite(values).all()):
            refuse(f"a selected value is {float(values[~torch.isfinite(values)][0])} ({where})")
        if reported != count:
            refuse(f"select reported nonfinite = {reported}, but {count} elements are NaN or infinite ({where})")
        if not _same_bits(self.residual[bad], before[bad]):
            refuse(f"the residual was changed where the sum is NaN or infinite: it must stay as it was ({where})")

    def _check_books(
        self, before: torch.Tensor, step: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, where: str
    ) -> None:
        expected = (before + step).double()
        expected = torch.where(torch.isfinite(expected), expected, before.double())
        out = self.residual.double()
        out[indices] += values.double()
        allowed = 4 * _EPS * (before.double().abs() + step.double().abs()) + _TINY
        wrong = ((out - expected).abs() > allowed) | ~torch.isfinite(out)
        wrong &= torch.isfinite(before + step)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            sent = "selected" if bool((indices == i).any()) else "not selected"
            refuse(
                f"not conserved at position {i} ({sent}): residual {float(before[i]):.9g} + gradient "
                f"{float(step[i]):.9g} = {float(expected[i]):.9g} came in, but selected + residual is "
                f"{float(out[i]):.9g} ({where})"
            )
        left = indices[self.residual[indices] != 0]
        if left.numel():
            i = int(left[0])
            refuse(
                f"the residual at the selected position {i} is {float(self.residual[i]):.9g}: it must be zero there, "
                f"for undoing a step puts back what was selected and nothing else ({where})"
            )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _check_bucket(
    compressor: Compressor, numel: int, dtype: torch.dtype, kind: str, k: int, steps: int, seed: int
) -> None:
    """Some steps in one bucket, twice: the second time everything must be the same."""
    runs = []
    for _ in range(2):
        bucket, made = _Bucket.empty(compressor, numel), []
        for step in range(steps):
            # NaN comes when there is something in the residual already.
            now = kind if kind in FINITE or step % 2 else "normal"
            grad = gradient(now, numel, dtype, seed + 1000 * step)
            scale = 1.0 if step % 2 == 0 else 0.5
            where = (
                f"{numel} elements, {str(dtype).removeprefix('torch.')}, {now}, k = {k}, scale = {scale}, step {step}"
            )
            made.append((*bucket.step(grad, k, scale, where), bucket.residual.clone(), where))
        runs.append(made)
    for first, second in zip(*runs, strict=True):
        if not all(_same_bits(a, b) for a, b in zip(first[:3], second[:3], strict=True)):
            refuse(
                "the same gradients were compressed otherwise the second time: a run could not be repeated; "
                f"draw random numbers from a seed and keep state in `memory` alone ({first[3]})"
            )


def _check_schedule(compressor: Compressor, numel: int, seed: int) -> None:
    """Buffers suffice while k changes with the steps."""
    bucket = _Bucket.empty(compressor, numel)
    for step in _STEPS:
        k = compressor.k_for(numel, step)
        grad = gradient("normal", numel, torch.float32, seed + step)
        bucket.step(grad, k, 1.0, f"{numel} elements, k = k_for({numel}, {step}) = {k}, after other k")


def _check_independence(compressor: Compressor, numel: int, steps: int, seed: int) -> None:
    """A bucket that takes turns with another one gives what it gives alone."""

    def run(beside: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        mine, other = _Bucket.empty(compressor, numel), _Bucket.empty(compressor, numel + 5)
        made = []
        for step in range(steps):
            k = compressor.k_for(numel, step)
            made.append(mine.step(gradient("normal", numel, torch.float32, seed + step), k, 1.0, f"step {step}"))
            if beside:
                grad = 100 * gradient("wide", numel + 5, torch.float32, seed + step)
                other.step(grad, compressor.k_for(numel + 5, step), 1.0, f"step {step}, another bucket")
        return made

    for step, (alone, together) in enumerate(zip(run(False), run(True), strict=True)):
        if not all(_same_bits(a, b) for a, b in zip(alone, together, strict=True)):
            refuse(
                f"a bucket of {numel} elements is compressed otherwise in step {step} if another bucket comes between: "
                "a compressor serves all buckets, so keep what is remembered of one in `memory`, not in the compressor"
            )


def _check_liveness(compressor: Compressor, numel: int, seed: int) -> None:
    bucket, sent = _Bucket.empty(compressor, numel), 0
    for step in range(10):
        grad = gradient("normal", numel, torch.float32, seed + step)
        sent += bucket.step(grad, compressor.k_for(numel, step), 1.0, f"step {step}")[0].numel()
    if not sent:
        refuse(f"nothing was selected in 10 steps from a bucket of {numel} elements: nothing would ever be trained")
