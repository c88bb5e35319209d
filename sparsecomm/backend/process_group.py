"""The process group: torch's collectives, each as a generator over the engine's channels.

Methods have the names and parameters by which torch.distributed calls them, also those of older releases of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import AllreduceOptions, GatherOptions, ReduceOptions, ReduceScatterOptions, ScatterOptions

from sparsecomm.backend import moves, sums
from sparsecomm.backend.group import EngineGroup
from sparsecomm.backend.octets import Flat, check_tensors, pieces
from sparsecomm.backend.reduction import Reduction
from sparsecomm.backend.sparse import check_sparse, sum_sparse
from sparsecomm.errors import ConfigError
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["SparsecommGroup"]

_Tensors = list[torch.Tensor]


def _listed(tensors: torch.Tensor | _Tensors) -> _Tensors:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _kind(tensors: Sequence[torch.Tensor]) -> str:
    """Returns shapes and dtype of tensors for a description."""
    shapes = " ".join(str(tuple(t.shape)).replace(" ", "") for t in tensors[:16])
    more = f" and {len(tensors) - 16} more of {sum(t.numel() for t in tensors)} elements" if len(tensors) > 16 else ""
    return f"{shapes}{more} {str(tensors[0].dtype).removeprefix('torch.')}"


def _parts(tensor: torch.Tensor, sizes: Sequence[int] | None, count: int, name: str) -> _Tensors:
    """Cuts a tensor along its first dimension, into equal parts if no sizes are given."""
    rows = tensor.shape[0] if tensor.dim() else 0
    if not sizes:
        if tensor.dim() == 0 or rows % count:
            raise ConfigError(f"{name}: a tensor of shape {tuple(tensor.shape)} has no {count} equal parts")
        return pieces(tensor, [rows // count] * count)
    if len(sizes) != count or sum(sizes) != rows or min(sizes) < 0:
        raise ConfigError(f"{name}: split sizes {list(sizes)} do not cut {rows} rows for {count} ranks")
    return pieces(tensor, sizes)


class SparsecommGroup(EngineGroup):
    """A process group of the backend "sparsecomm".

    All collectives return a Work at once and end without the caller. Tensors may have any dtype and strides, be empty,
    and must be in host memory. They must not change until the Work has ended.
    """

    def broadcast(  # type: ignore[override]
        self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, root: int | None = None
    ) -> Any:
        """Sends the root's tensors to all ranks. `opts` may be the root itself."""
        tensors, found = _listed(tensors), getattr(opts, "rootRank", opts)
        source = int(found if root is None and found is not None else root or 0)
        check_tensors(tensors, "broadcast")
        self._check_rank(source)

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            flat = Flat(tensors, read=channel.rank == source)
            yield from moves.spread(channel, flat.octets, source)
            if channel.rank != source:
                flat.write()

        told = f"broadcast({_kind(tensors)}, from rank {source})"
        return self._start(told, tensors, steps, getattr(opts, "timeout", timeout))

    def allreduce(  # type: ignore[override]
        self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, op: Any = None
    ) -> Any:
        """Combines the tensors of all ranks, in place. `opts` may be the operation itself."""
        tensors, opts = _listed(tensors), AllreduceOptions() if opts is None else opts
        op = getattr(opts, "reduceOp", opts) if op is None else op
        if len(tensors) == 1 and tensors[0].layout != torch.strided:
            return self._sum_sparse(tensors[0], op)
        reduction = self._reduction(op, tensors, "all_reduce")

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            flat = Flat(tensors)
            yield from sums.allreduce(channel, flat.vector, reduction, arena)
            flat.write()

        told = f"all_reduce({_kind(tensors)}, {reduction.name})"
        return self._start(told, tensors, steps, getattr(opts, "timeout", timeout))

    def _sum_sparse(self, tensor: torch.Tensor, op: Any) -> Any:
        check_sparse(tensor, getattr(op, "op", op).name)

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            return sum_sparse(channel, tensor)

        return self._start(f"all_reduce({_kind([tensor])} sparse, SUM)", [tensor], steps)

    def allreduce_coalesced(self, tensors: _Tensors, opts: Any = None) -> Any:
        """Combines many tensors in one operation."""
        return self.allreduce(tensors, opts)

    def reduce(  # type: ignore[override]
        self, tensors: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None, root: int | None = None
    ) -> Any:
        """Combines the tensors of all ranks on the root. `opts` may be the root itself."""
        tensors, opts = _listed(tensors), ReduceOptions() if opts is None else opts
        target = int(getattr(opts, "rootRank", opts) if root is None else root)
        self._check_rank(target)
        op = getattr(opts, "reduceOp", torch.distributed.ReduceOp.SUM) if op is None else op
        reduction = self._reduction(op, tensors, "reduce")

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            flat = Flat(tensors)
            yield from sums.reduce_to(channel, flat.vector, target, reduction, arena)
            if channel.rank == target:
                flat.write()

        told = f"reduce({_kind(tensors)}, {reduction.name}, to rank {target})"
        return self._start(told, tensors, steps, getattr(opts, "timeout", timeout))

    def allgather(  # type: ignore[override]
        self, output_tensors: Any, input_tensor: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Any:
        """Gathers a tensor of every rank on every rank. Ranks may have different shapes if all ranks know them."""
        mine = _listed(input_tensor)[0]
        outputs = output_tensors[0] if isinstance(output_tensors[0], list) else list(output_tensors)
        return self._gather_lists("all_gather", [outputs], [mine], getattr(opts, "timeout", timeout))

    def allgather_coalesced(self, output_lists: list[_Tensors], input_list: _Tensors, opts: Any = None) -> Any:
        """Gathers several tensors of every rank; `output_lists[r]` gets those of rank r."""
        by_tensor = [list(one) for one in zip(*output_lists, strict=True)]
        return self._gather_lists("all_gather_coalesced", by_tensor, input_list, getattr(opts, "timeout", None))

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        """Gathers a tensor of every rank into one tensor."""
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, output_lists: _Tensors, input_list: _Tensors, opts: Any = None) -> Any:
        """Gathers several tensors of every rank into one tensor each."""
        name = "all_gather_into_tensor"
        check_tensors(output_lists, name)
        for output, mine in zip(output_lists, input_list, strict=True):
            if output.numel() != mine.numel() * self.size():
                raise ConfigError(
                    f"{name}: output of {output.numel()} elements for {self.size()} inputs of {mine.numel()}"
                )
        limit = getattr(opts, "timeout", None)
        return self._gather_lists(name, [[output] for output in output_lists], input_list, limit)

    def _gather_lists(self, name: str, outputs: list[_Tensors], inputs: _Tensors, timeout: timedelta | None) -> Any:
        """Gathers each input into the list of tensors, or the one tensor, of the same place in `outputs`."""
        size = self.size()
        for outs, mine in zip(outputs, inputs, strict=True):
            check_tensors([mine, *outs], name)
            whole = len(outs) == 1 and outs[0].numel() == mine.numel() * size
            if not whole and (len(outs) != size or outs[self.rank()].numel() != mine.numel()):
                raise ConfigError(f"{name}: {len(outs)} outputs for {size} inputs of shape {tuple(mine.shape)}")

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            for outs, mine in zip(outputs, inputs, strict=True):
                flats = [Flat([out], read=False) for out in outs]
                whole = len(outs) == 1
                vectors = list(flats[0].vector.chunk(size)) if whole else [f.vector for f in flats]
                if whole and not flats[0].vector.numel():
                    vectors = [flats[0].vector] * size
                own = Flat([mine])
                blocks = [v.view(torch.uint8) for v in vectors]
                if blocks[channel.rank].data_ptr() != own.octets.data_ptr():
                    vectors[channel.rank].copy_(own.vector)
                yield from moves.gather_all(channel, blocks[channel.rank], blocks)
                for flat in flats:
                    flat.write()

        told = f"{name}({'; '.join(_kind(outs) for outs in outputs[:4])})"
        return self._start(told, [t for outs in outputs for t in outs], steps, timeout)

    def gather(self, output_tensors: Any, input_tensor: Any, opts: Any = None, timeout: timedelta | None = None) -> Any:
        """Gathers a tensor of every rank on the root. `opts` may be the root itself."""
        mine, opts = _listed(input_tensor)[0], GatherOptions() if opts is None else opts
        root = int(getattr(opts, "rootRank", opts))
        nested = bool(output_tensors) and isinstance(output_tensors[0], list)
        outputs: _Tensors = list(output_tensors[0] if nested else output_tensors)
        self._check_rank(root)
        check_tensors([mine, *outputs], "gather")
        if self.rank() == root and len(outputs) != self.size():
            raise ConfigError(f"gather: {len(outputs)} outputs on the root for {self.size()} ranks")

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            own = Flat([mine])
            flats = [Flat([out], read=False) for out in outputs] if channel.rank == root else []
            yield from moves.gather_to(channel, own.octets, [f.octets for f in flats], root)
            for rank, flat in enumerate(flats):
                if rank == root:
                    flat.vector.copy_(own.vector)
                flat.write()

        told = f"gather({_kind([mine])}, to rank {root})"
        return self._start(told, outputs, steps, getattr(opts, "timeout", timeout))

    def scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Any:
        """Sends every rank its tensor from the root. `opts` may be the root itself."""
        out, opts = _listed(output_tensors)[0], ScatterOptions() if opts is None else opts
        root = int(getattr(opts, "rootRank", opts))
        nested = bool(input_tensors) and isinstance(input_tensors[0], list)
        inputs: _Tensors = list(input_tensors[0] if nested else input_tensors)
        self._check_rank(root)
        check_tensors([out, *inputs], "scatter")
        if self.rank() == root and len(inputs) != self.size():
            raise ConfigError(f"scatter: {len(inputs)} inputs on the root for {self.size()} ranks")

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            flat = Flat([out], read=False)
            blocks = [Flat([t]).vector for t in inputs] if channel.rank == root else []
            yield from moves.scatter_from(channel, flat.octets, [b.view(torch.uint8) for b in blocks], root)
            if channel.rank == root:
                flat.vector.copy_(blocks[root])
            flat.write()

        told = f"scatter({_kind([out])}, from rank {root})"
        return self._start(told, [out], steps, getattr(opts, "timeout", timeout))

    def reduce_scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Any:
        """Combines the i-th inputs of all ranks on rank i. `opts` may be the operation itself."""
        out = _listed(output_tensors)[0]
        inputs: _Tensors = list(input_tensors[0] if isinstance(input_tensors[0], list) else input_tensors)
        return self._reduce_scatter("reduce_scatter", [out], [inputs], opts, timeout)

    def reduce_scatter_single(self, outputTensor: torch.Tensor, inputTensor: torch.Tensor, opts: Any = None) -> Any:
        """Combines the i-th parts of the inputs of all ranks on rank i."""
        return self.reduce_scatter_single_coalesced([outputTensor], [inputTensor], opts)

    def reduce_scatter_single_coalesced(self, outputTensors: _Tensors, inputTensors: _Tensors, opts: Any = None) -> Any:
        """Combines parts of several tensors in one operation."""
        inputs = [[tensor] for tensor in inputTensors]
        return self._reduce_scatter("reduce_scatter_tensor", outputTensors, inputs, opts, None)

    def _reduce_scatter(
        self, name: str, outputs: _Tensors, inputs: list[_Tensors], opts: Any, timeout: timedelta | None
    ) -> Any:
        size = self.size()
        opts = ReduceScatterOptions() if opts is None else opts
        reduction = self._reduction(getattr(opts, "reduceOp", opts), outputs, name)
        for out, ins in zip(outputs, inputs, strict=True):
            check_tensors([out, *ins], name)
            whole = len(ins) == 1 and ins[0].numel() == out.numel() * size
            if not whole and (len(ins) != size or ins[self.rank()].numel() != out.numel()):
                raise ConfigError(f"{name}: {len(ins)} inputs for {size} outputs of shape {tuple(out.shape)}")

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            for out, ins in zip(outputs, inputs, strict=True):
                n, flat = out.numel(), Flat([out], read=False)
                if len(ins) == 1:
                    whole = Flat(ins).vector
                    segments = [whole[r * n : (r + 1) * n] for r in range(size)]
                else:
                    segments = [Flat([t]).vector for t in ins]
                yield from sums.reduce_scatter(channel, segments, flat.vector, reduction, arena)
                flat.write()

        told = f"{name}({'; '.join(_kind(ins) for ins in inputs[:4])}, {reduction.name})"
        return self._start(told, outputs, steps, getattr(opts, "timeout", timeout))

    def all_to_all_single(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        opts: Any = None,
    ) -> Any:
        """Sends parts of a tensor to all ranks and receives a part of every rank's."""
        name, size = "all_to_all_single", self.size()
        takes = _parts(output_tensor, output_split_sizes, size, name)
        gives = _parts(input_tensor, input_split_sizes, size, name)
        return self._all_to_all(name, takes, gives, opts)

    def alltoall(self, output_tensor: _Tensors, input_tensor: _Tensors, opts: Any = None) -> Any:
        """Sends a tensor to every rank and receives one from every rank."""
        if not len(output_tensor) == len(input_tensor) == self.size():
            raise ConfigError(
                f"all_to_all: {len(input_tensor)} inputs and {len(output_tensor)} outputs for {self.size()} ranks"
            )
        return self._all_to_all("all_to_all", list(output_tensor), list(input_tensor), opts)

    def _all_to_all(self, name: str, takes: _Tensors, gives: _Tensors, opts: Any) -> Any:
        check_tensors([*takes, *gives], name)
        rank = self.rank()
        if takes[rank].numel() != gives[rank].numel():
            raise ConfigError(
                f"{name}: this rank gives itself {gives[rank].numel()} elements and takes {takes[rank].numel()}"
            )

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            ins = [Flat([t]) for t in gives]
            outs = [Flat([t], read=False) for t in takes]
            outs[channel.rank].vector.copy_(ins[channel.rank].vector)
            yield from moves.exchange(channel, [f.octets for f in ins], [f.octets for f in outs])
            for flat in outs:
                flat.write()

        told = f"{name}({str(takes[0].dtype).removeprefix('torch.')})"
        return self._start(told, takes, steps, getattr(opts, "timeout", opts if isinstance(opts, timedelta) else None))

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Any:  # type: ignore[override]
        """Waits until all ranks have come here."""

        def steps(channel: Channel, arena: Arena) -> CollectiveSteps[None]:
            return moves.barrier(channel)

        return self._start("barrier()", [], steps, getattr(opts, "timeout", timeout))

    def _reduction(self, op: Any, tensors: _Tensors, name: str) -> Reduction:
        check_tensors(tensors, name)
        return Reduction(op, tensors[0].dtype, self.size())

    # the names of other releases of torch
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single  # type: ignore[assignment]
