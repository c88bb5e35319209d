"""All options of an exchange in one frozen object."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch.distributed as dist

from sparsecomm.compress import Compressor, TopK
from sparsecomm.compress.base import SparsifyingCompressor
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.method import Scope, method_named, methods
from sparsecomm.feedback import ErrorFeedback, Feedback
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["FUSE_BYTES", "SparseConfig"]

FUSE_BYTES = 1 << 16
"""Default of `SparseConfig.fuse_bytes`."""
_VALUE_CODECS = {"auto": ValueCodec.FP16} | {c.name.lower(): c for c in ValueCodec}
_INDEX_CODECS = {"auto": None} | {c.name.lower(): c for c in IndexCodec if c != IndexCodec.DENSE}


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Options of a `SparseState`.

    Attributes:
        compressor: selects the elements to send: `TopK`, `ThresholdTopK`, `ChunkTopK`, `RandomK`, `CyclicTopK`,
            `Dense`, for comparison `Sign` or `PowerSGD`, or your own.
        feedback: treatment of elements that are not sent. `ErrorFeedback()` keeps them for later steps.
            `MomentumCorrection(...)` applies momentum first (DGC), `AdamCorrection(...)` computes Adam's update first,
            and both keep the rest. None drops it.
        collective: name of the exchange method. "auto" measures and takes the fastest (`SparseState.explain` gives its
            reasons). With any compressor: "allgather", "dense", "native" (the allreduce of torch.distributed, as in
            plain DDP), "split_reduce" (its bytes do not grow with the number of ranks), "ssar" (as "split_reduce", but
            keeps all sums), "two_level" (dense inside a node, sparse between nodes) or, for comparison, "tree". With
            `ChunkTopK`: "chunked". With `RandomK` and `CyclicTopK`: "shared_index". With `Sign`: "sign". With
            `PowerSGD`: "powersgd".
        value_codec: "auto" (fp16 in sparse exchanges, fp32 in dense ones), "int8" (in sparse exchanges, fp32 in dense
            ones), "fp32", "fp16" or "bf16". The rounding stays in the residual.
        index_codec: "auto" (the smallest), "rice", "bitpack", "bitmap" or "raw".
        dense_below: buckets with fewer elements are exchanged densely.
        dense_steps: number of steps at the start in which all buckets are exchanged densely.
        fuse_bytes: consecutive buckets with fewer bytes of gradients are exchanged as one, once they have this many
            bytes together; 0 to never fuse. By default 64 KiB: below that an exchange costs more than its elements.
        inner_group: for "two_level", the torch process group of this rank's node (NCCL on GPUs) for the sum inside the
            node.

    Raises:
        ConfigError: an option is unknown or has an unacceptable value. The error names the option and the value.
    """

    compressor: Compressor = field(default_factory=TopK)
    feedback: Feedback | None = field(default_factory=ErrorFeedback)
    collective: str = "auto"
    value_codec: str = "auto"
    index_codec: str = "auto"
    dense_below: int = 0
    dense_steps: int = 0
    fuse_bytes: int = field(default_factory=lambda: FUSE_BYTES)
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
        """Returns a config made from a compressor or another config, and options that override it.

        Raises:
            ConfigError: an option does not exist. The error lists all options.
        """
        base = compressor if isinstance(compressor, SparseConfig) else cls()
        if compressor is not None and not isinstance(compressor, SparseConfig):
            options = {"compressor": compressor, **options}
        return base.change(**options)

    def change(self, **options: Any) -> SparseConfig:
        """Returns a copy with other options; `density=` changes the compressor's density.

        Raises:
            ConfigError: an option does not exist, or `density` was given and the compressor has none.
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
        """Checks that the method works with the compressor; those that do not compress, and "auto", work with any."""
        if self.collective == "auto" or not method_named(self.collective).compresses:
            return
        only, maker = self.compressor.collectives, type(self.compressor).__name__
        if only and self.collective not in only:
            raise ConfigError(f"collective={self.collective!r} cannot exchange what {maker} makes; use {only[0]!r}")
        if not only and method_named(self.collective).scope == Scope.OWN:
            raise ConfigError(f"collective={self.collective!r} needs a compressor made for it, not {maker}")

    # Read for every bucket of every step, hence worked out once.

    @cached_property
    def method(self) -> str | None:
        """The name of the exchange method; None if "auto" chooses one."""
        only = self.compressor.collectives
        if self.collective != "auto":
            return self.collective
        return only[0] if only else None

    @cached_property
    def values(self) -> ValueCodec:
        """Codec of the values in a sparse exchange."""
        return _VALUE_CODECS[self.value_codec]

    @cached_property
    def dense_values(self) -> ValueCodec:
        """Codec of the values in a dense exchange: fp32, which rounds nothing, unless a codec of sums was given."""
        return ValueCodec.FP32 if self.any_dense_values else self.values

    @property
    def any_dense_values(self) -> bool:
        """Whether `value_codec` leaves open how values travel in dense exchanges."""
        return self.value_codec in ("auto", "int8")

    @cached_property
    def indices(self) -> IndexCodec | None:
        """Codec of the positions; None for the smallest."""
        return _INDEX_CODECS[self.index_codec]


def _one_of(name: str, value: Any, known: Collection[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
