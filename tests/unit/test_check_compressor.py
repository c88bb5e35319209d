"""`check_compressor` accepts all built-in compressors, and names the fault of broken ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sparsecomm as sc
from sparsecomm.compress import Selection, SelectionBuffers
from sparsecomm.compress.base import SelectorMemory, SparsifyingCompressor
from sparsecomm.testing import ContractError, check_compressor

QUICK: dict[str, Any] = {"numels": (0, 1, 40), "ranks": (2,), "steps": 3}


@pytest.mark.parametrize(
    "compressor",
    [
        sc.TopK(0.05),
        sc.TopK(1.0),
        sc.TopK(sc.Warmup((0.5, 0.1), steps_per_stage=2, final=0.01)),
        sc.TopK(lambda step: 1.0 / (1 + step)),
        sc.ThresholdTopK(0.1, interval=2),
        sc.Dense(),
        sc.ChunkTopK(0.2, chunk=16),
        sc.RandomK(0.1),
        sc.CyclicTopK(0.1),
    ],
    ids=lambda compressor: str(compressor).partition(" at 0x")[0],  # the same in all workers of pytest-xdist
)
def test_ours_pass(compressor: sc.Compressor) -> None:
    check_compressor(compressor, numels=(0, 1, 7, 130), ranks=(1, 3), steps=3)


@dataclass(frozen=True)
class Slow(SparsifyingCompressor):
    """Top-k in plain torch, right in everything; those below break one thing each."""

    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        acc = residual + grad.float() * scale
        finite = acc.isfinite()
        residual.copy_(torch.where(finite, acc, residual))
        magnitudes = torch.where(finite, acc.abs(), -torch.ones_like(acc))
        chosen = self.positions(magnitudes, min(k, int(finite.sum())))
        n = chosen.numel()
        out.indices[:n] = chosen.to(torch.uint32)
        out.values[:n] = residual[chosen]
        residual[chosen] = 0.0
        return Selection(n, int((~finite).sum()))

    def positions(self, magnitudes: torch.Tensor, k: int) -> torch.Tensor:
        return magnitudes.topk(k).indices.sort().values


def test_plain_torch_passes() -> None:
    check_compressor(Slow(0.1))


class Loses(Slow):
    """Forgets the smallest."""

    def select(self, grad: Any, residual: Any, *args: Any, **options: Any) -> Selection:
        done = super().select(grad, residual, *args, **options)
        residual[residual.abs() < 0.01] = 0.0
        return done


class Keeps(Slow):
    """Leaves selected values in the residual, so that they are sent again."""

    def select(self, grad: Any, residual: Any, k: Any, memory: Any, out: Any, **options: Any) -> Selection:
        done = super().select(grad, residual, k, memory, out, **options)
        residual[out.indices[: done.nnz].long()] = out.values[: done.nnz]
        return done


class LeavesRest(Slow):
    """Sends half of each value and keeps the other half: the books balance, but it cannot be undone."""

    def select(self, grad: Any, residual: Any, k: Any, memory: Any, out: Any, **options: Any) -> Selection:
        done = super().select(grad, residual, k, memory, out, **options)
        out.values[: done.nnz] /= 2
        residual[out.indices[: done.nnz].long()] = out.values[: done.nnz]
        return done


class Learns(Slow):
    """Uses autograd, which is off where compressors run."""

    def positions(self, magnitudes: torch.Tensor, k: int) -> torch.Tensor:
        weight = torch.ones_like(magnitudes).requires_grad_()
        with torch.enable_grad():
            (weight * magnitudes).sum().backward()
        return super().positions(magnitudes, k)


class Unsorted(Slow):
    def positions(self, magnitudes: torch.Tensor, k: int) -> torch.Tensor:
        return magnitudes.topk(k).indices


class Twice(Slow):
    def select(self, grad: Any, residual: Any, k: Any, memory: Any, out: Any, **options: Any) -> Selection:
        done = super().select(grad, residual, k, memory, out, **options)
        if done.nnz > 1:
            out.indices[1] = int(out.indices[0])
        return done


class OutOfRange(Slow):
    def select(self, grad: Any, residual: Any, k: Any, memory: Any, out: Any, **options: Any) -> Selection:
        done = super().select(grad, residual, k, memory, out, **options)
        if done.nnz:
            out.indices[done.nnz - 1] = residual.numel()
        return done


class TakesNan(Slow):
    def select(self, grad: Any, residual: Any, k: Any, memory: Any, out: Any, **options: Any) -> Selection:
        acc = residual + grad.float() * options["scale"]
        chosen = acc.nan_to_num(nan=9e9).abs().topk(k).indices.sort().values
        n = chosen.numel()
        out.indices[:n], out.values[:n] = chosen.to(torch.uint32), acc[chosen]
        residual.copy_(acc)
        residual[chosen] = 0.0
        return Selection(n, int((~acc.isfinite()).sum()))


class SpoilsResidual(Slow):
    """Never selects NaN, but lets it into the residual."""

    def select(self, grad: Any, residual: Any, *args: Any, **options: Any) -> Selection:
        bad = ~(residual + grad.float() * options["scale"]).isfinite()
        done = super().select(grad, residual, *args, **options)
        residual[bad] = torch.nan
        return done


class DoesNotSayNan(Slow):
    def select(self, *args: Any, **options: Any) -> Selection:
        return Selection(super().select(*args, **options).nnz, 0)


class TooMany(Slow):
    """Fits in with its k, but says a smaller capacity."""

    def select(self, *args: Any, **options: Any) -> Selection:
        done = super().select(*args, **options)
        return Selection(done.nnz + 1, done.nonfinite)


class SmallBuffers(Slow):
    def capacity(self, k: int, numel: int) -> int:
        return min(k, numel) // 2


class NoScale(Slow):
    def select(self, *args: Any, **options: Any) -> Selection:
        return super().select(*args, scale=1.0)


class HalfPrecision(Slow):
    """Adds up in the gradient's own precision."""

    def select(self, grad: Any, residual: Any, *args: Any, scale: float = 1.0) -> Selection:
        residual.copy_(residual.to(grad.dtype))
        return super().select(grad, residual, *args, scale=scale)


class NoHalf(Slow):
    def select(self, grad: Any, residual: Any, *args: Any, scale: float = 1.0) -> Selection:
        residual += torch.from_numpy(grad.numpy()) * 0  # numpy has no bfloat16
        return super().select(grad, residual, *args, scale=scale)


class ChangesGradient(Slow):
    def select(self, grad: Any, *args: Any, **options: Any) -> Selection:
        done = super().select(grad, *args, **options)
        grad.zero_()
        return done


class Rolls(Slow):
    """Random without a seed."""

    def positions(self, magnitudes: torch.Tensor, k: int) -> torch.Tensor:
        candidates = (magnitudes >= 0).nonzero().flatten()
        return candidates[torch.randperm(candidates.numel())[:k]].sort().values


class Remembers(Slow):
    """Keeps its threshold in itself, where all buckets meet."""

    seen: list[float] = []  # noqa: RUF012  # the mistake that is to be found

    def select(self, grad: Any, residual: Any, k: Any, memory: Any, out: Any, **options: Any) -> Selection:
        if memory.age == 0:
            self.seen.clear()
        memory.age += 1
        if grad.numel():
            self.seen.append(float(grad.float().nan_to_num().abs().max()))
        if self.seen and self.seen[-1] < max(self.seen) / 10:
            k = min(k, 1)
        return super().select(grad, residual, k, memory, out, **options)


class NotEmpty(Slow):
    def positions(self, magnitudes: torch.Tensor, k: int) -> torch.Tensor:
        assert float(magnitudes.max()) >= -1
        return super().positions(magnitudes, k)


class NotAll(Slow):
    """Partitions one past k."""

    def positions(self, magnitudes: torch.Tensor, k: int) -> torch.Tensor:
        return magnitudes.topk(k + 1).indices[:k].sort().values


class Silent(Slow):
    def positions(self, magnitudes: torch.Tensor, k: int) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)


class ReturnsNumber(Slow):
    def select(self, *args: Any, **options: Any) -> Any:
        return super().select(*args, **options).nnz


class Half(Slow):
    def density_at(self, step: int) -> float:
        return 0.5 - step / 100


class Greedy(Slow):
    def k_for(self, numel: int, step: int) -> int:
        return numel + 1


class FractionOfK(Slow):
    def k_for(self, numel: int, step: int) -> int:
        return 0.1 * numel  # type: ignore[return-value]


class Elsewhere(Slow):
    collectives = ("telepathy",)


class WrongCollective(Slow):
    """Fits the interface of a collective that needs more than this."""

    collectives = ("shared_index",)


class Infinite(Slow):
    """Rounds to a coarse float16, which overflows for large sums: the value is infinite."""

    def select(self, grad: Any, residual: Any, k: Any, memory: Any, out: Any, **options: Any) -> Selection:
        done = super().select(grad, residual, k, memory, out, **options)
        out.values[: done.nnz] = (out.values[: done.nnz] * 1e38 * 1e38).nan_to_num(0.0, 1.0, 1.0) * torch.inf
        return done


BROKEN = [
    (Loses(0.1), "not conserved at position"),
    (Keeps(0.1), "not conserved at position"),
    (LeavesRest(0.1), "it must be zero there"),
    (Learns(0.1), "select raised RuntimeError: .*(does not require grad|[Ii]nference)"),
    (Unsorted(0.5), "must be strictly ascending"),
    (Twice(0.5), "comes twice"),
    (OutOfRange(0.1), "is out of range"),
    (TakesNan(0.1), "was selected although NaN or infinite"),
    (SpoilsResidual(0.1), "the residual was changed where the sum is NaN"),
    (DoesNotSayNan(0.1), "reported nonfinite = 0"),
    (TooMany(0.1), "more than its own capacity"),
    (SmallBuffers(0.1), r"more than its own capacity\(1, \.\.\.\) = 0"),
    (NoScale(0.1), "not conserved at position|was changed|TypeError"),
    (HalfPrecision(0.1), "not conserved at position .*float16"),
    (NoHalf(0.1), "select raised TypeError: .*bfloat16|select raised .*BFloat16"),
    (ChangesGradient(0.1), "select changed the gradient"),
    (Rolls(0.1), "another selection the second time"),
    (Remembers(0.1), "keep the state of a bucket in `memory`"),
    (NotEmpty(0.1), r"select raised .*\(0 elements"),
    (NotAll(0.1), "select raised RuntimeError"),
    (Silent(0.1), "nothing was selected in 10 steps"),
    (ReturnsNumber(0.1), "not a Selection"),
    (Half(0.1), r"density_at\(100\) returned -0\.5"),
    (Greedy(0.1), r"k_for\(0, 0\) returned 1"),
    (FractionOfK(0.1), r"k_for\(0, 0\) returned 0\.0: it must be an int"),
    (Elsewhere(0.1), "collectives = .'telepathy'"),
    (WrongCollective(0.1), "an exchange raised ConfigError: .*needs a RandomK or CyclicTopK"),
    (Infinite(0.1), "a selected value is"),
    (sc.TopK, "pass an instance, not the class"),
    ("topk", "'topk' is not an instance of sparsecomm.Compressor"),
]


@pytest.mark.parametrize(("compressor", "message"), BROKEN, ids=[getattr(type(c), "__name__", "?") for c, _ in BROKEN])
def test_what_is_broken_is_named(compressor: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        check_compressor(compressor, **QUICK)
    assert isinstance(caught.value, AssertionError)


def test_what_only_shows_between_ranks_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compressor is correct, but the strategy loses values."""
    from sparsecomm.exchange.methods.allgather import Allgather

    def lossy(self: Allgather, out: torch.Tensor, scale: float) -> None:
        average(self, out, scale)
        out[: out.numel() // 2] = 0.0

    average = Allgather.write_average
    monkeypatch.setattr(Allgather, "write_average", lossy)
    with pytest.raises(ContractError, match="not conserved over ranks at position"):
        check_compressor(sc.TopK(0.5), **QUICK)
    monkeypatch.setattr(
        Allgather, "write_average", lambda self, out, scale: out.fill_(float(self.exchange.channel.rank))
    )
    with pytest.raises(ContractError, match="ranks 0 and 1 have different averages"):
        check_compressor(sc.TopK(0.5), **QUICK)
