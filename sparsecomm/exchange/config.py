"""All options of an exchange in one frozen object that can be printed, compared and changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch.distributed as dist

from sparsecomm.compress import Compressor, TopK
from sparsecomm.compress.base import SparsifyingCompressor
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.method import Scope, method_named, methods
from sparsecomm.feedback import ErrorFeedback, Feedback
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["SparseConfig"]

_VALUE_CODECS = {"auto": ValueCodec.FP16} | {c.name.lower(): c for c in ValueCodec}
_INDEX_CODECS = {"auto": None} | {c.name.lower(): c for c in IndexCodec if c != IndexCodec.DENSE}


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Options of a `SparseState`.

    Attributes:
        compressor: how gradients are sparsified: `TopK`, `ThresholdTopK`, `ChunkTopK`, `RandomK`, `CyclicTopK`,
            `Dense`, for comparison `Sign` or `PowerSGD`, or your own.
        feedback: `ErrorFeedback()` keeps what is not sent for later steps; `MomentumCorrection(...)` does so after
            applying momentum (DGC), `AdamCorrection(...)` after turning it into Adam's update; None drops it.
        collective: "auto" (the fastest here, found by measuring; see `SparseState.explain`), "allgather", "dense",
            "split_reduce" (whose bytes do not grow with the number of ranks) or "ssar" (the same without selecting
            again), "two_level" (dense inside a node, sparse between nodes) or, for comparison, "tree". With `ChunkTopK`
            "chunked", with `RandomK` and `CyclicTopK` "shared_index", with `Sign` "sign", with `PowerSGD` "powersgd".
        value_codec: "auto" (fp16 where sparse, fp32 where dense), "fp32", "fp16", "bf16" or "int8" (fp16 where dense);
            what rounding drops stays in the residual.
        index_codec: "auto" (the smallest), "rice", "bitpack", "bitmap" or "raw".
        dense_below: buckets of fewer elements are exchanged densely.
        dense_steps: the first steps are exchanged densely.
        inner_group: for "two_level", the torch process group of this rank's node (NCCL on GPUs), to sum over in the
            node.
        fuse_bytes: buckets with fewer bytes of gradients are held back until together they have as many, and exchanged
            as one; 0 for never.

    Raises:
        ConfigError: for an unknown or unacceptable option; names it and its value.
    """

    compressor: Compressor = field(default_factory=TopK)
    feedback: Feedback | None = field(default_factory=ErrorFeedback)
    collective: str = "auto"
    value_codec: str = "auto"
    index_codec: str = "auto"
    dense_below: int = 0
    dense_steps: int = 0
    fuse_bytes: int = 0
    inner_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise ConfigError(
                f"compressor must be a sparsecomm compressor such as TopK(density=0.01), got {self.compressor!r}"
            )
        if not (self.feedback is None or isinstance(self.feedback, Feedback)):
            raise ConfigError(
                "feedback must be ErrorFeedback(), MomentumCorrection(...), AdamCorrection(...) or None, "
                f"got {self.feedback!r}"
            )
        _one_of("collective", self.collective, ["auto", *methods()])
        self._check_collective()
        _one_of("value_codec", self.value_codec, _VALUE_CODECS)
        _one_of("index_codec", self.index_codec, _INDEX_CODECS)
        if not (self.inner_group is None or isinstance(self.inner_group, dist.ProcessGroup)):
            raise ConfigError(f"inner_group must be a process group that this rank is in, got {self.inner_group!r}")
        for name in ("dense_below", "dense_steps", "fuse_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be an int >= 0, got {value!r}")

    @classmethod
    def of(cls, compressor: Compressor | SparseConfig | None, options: Mapping[str, Any]) -> SparseConfig:
        """Builds a config from a compressor or another config, and options that override it.

        Raises:
            ConfigError: for an option that does not exist; lists those that do.
        """
        base = compressor if isinstance(compressor, SparseConfig) else cls()
        if compressor is not None and not isinstance(compressor, SparseConfig):
            options = {"compressor": compressor, **options}
        return base.change(**options)

    def change(self, **options: Any) -> SparseConfig:
        """Returns a copy with other options; `density=` changes the compressor's density.

        Raises:
            ConfigError: for an option that does not exist, or a density for a compressor that has none.
        """
        known = [f.name for f in fields(self)]
        unknown = sorted(set(options) - set(known) - {"density"})
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; known are {', '.join([*known, 'density'])}")
        density = options.pop("density", None)
        changed = replace(self, **options)
        if density is None:
            return changed
        if not isinstance(changed.compressor, SparsifyingCompressor):
            raise ConfigError(f"density = {density!r}: {changed.compressor!r} has no density")
        return replace(changed, compressor=replace(changed.compressor, density=density))

    def _check_collective(self) -> None:
        """Checks that the collective can exchange what the compressor makes; "dense" and "auto" always can."""
        if self.collective in ("auto", "dense"):
            return
        only, maker = self.compressor.collectives, type(self.compressor).__name__
        if only and self.collective not in only:
            raise ConfigError(f"collective={self.collective!r} cannot exchange what {maker} makes; use {only[0]!r}")
        if not only and method_named(self.collective).scope == Scope.OWN:
            raise ConfigError(f"collective={self.collective!r} needs a compressor made for it, not {maker}")

    @property
    def method(self) -> str | None:
        """The name of the exchange method; None if "auto" chooses one."""
        only = self.compressor.collectives
        if self.collective != "auto":
            return self.collective
        return only[0] if only else None

    @property
    def values(self) -> ValueCodec:
        """How values travel in a sparse exchange."""
        return _VALUE_CODECS[self.value_codec]

    @property
    def dense_values(self) -> ValueCodec:
        """How values travel in a dense exchange: by default nothing is rounded there."""
        return ValueCodec.FP32 if self.value_codec == "auto" else self.values

    @property
    def indices(self) -> IndexCodec | None:
        """The index codec; None for the smallest."""
        return _INDEX_CODECS[self.index_codec]


def _one_of(name: str, value: Any, known: Collection[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
