"""The C++ kernels: three builds of the same code in one binary, chosen by `set_path`.

The module can be imported without the binary; `problem` then says why it is missing. The functions of
`sparsecomm.kernels` have checked the arguments, which are passed to C++ as raw addresses and lengths, the cheapest kind
of call. C++ releases the GIL for work on 64 KiB and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from sparsecomm.errors import KernelError, WireError
from sparsecomm.kernels.api import BodyFormat, Described
from sparsecomm.types import IndexCodec, SelectResult, TopKResult, ValueCodec

problem: str | None = None
"""Why the native kernels cannot be used; None if they can."""
try:
    from sparsecomm import _core
except ImportError as error:
    problem = f"the extension sparsecomm._core could not be loaded: {error}"

__all__ = [
    "accumulate_dense",
    "accumulate_norms",
    "accumulate_select",
    "add_dense",
    "crc32c",
    "cut_topk",
    "decode_body",
    "decode_indices",
    "decode_values",
    "encode_body",
    "encode_indices",
    "encode_values",
    "exact_topk",
    "pack_dense",
    "problem",
    "release_scratch",
    "scatter_add",
    "scatter_reduce",
    "scratch_bytes",
    "set_path",
    "supported_paths",
    "unpack_dense",
]

_RICE_BYTES = 9
_VALUES = 20  # the first status that concerns values
_DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def supported_paths() -> tuple[str, ...]:
    """Returns the paths of the binary that this CPU can run, fastest first; none if there is no binary."""
    return () if problem else tuple(_core.paths())


def set_path(name: str) -> None:
    """Switches all functions of this module, in every thread, to one of `supported_paths()`."""
    _core.set_path(name)


def accumulate_select(
    grad: torch.Tensor,
    residual: torch.Tensor,
    threshold: float,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    scale: float = 1.0,
) -> SelectResult:
    """Accumulates and selects in one fused pass of the C++ code."""
    return SelectResult(
        *_core.accumulate_select(
            grad.data_ptr(),
            _DTYPE_CODE[grad.dtype],
            residual.data_ptr(),
            residual.numel(),
            threshold,
            out_indices.data_ptr(),
            out_values.data_ptr(),
            out_indices.numel(),
            scale,
        )
    )


def exact_topk(
    grad: torch.Tensor | None,
    residual: torch.Tensor,
    k: int,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    scale: float = 1.0,
) -> TopKResult:
    """Selects in one pass with a threshold from a sample; where that fails, by radix select over the whole vector."""
    return TopKResult(
        *_core.exact_topk(
            0 if grad is None else grad.data_ptr(),
            -1 if grad is None else _DTYPE_CODE[grad.dtype],
            residual.data_ptr(),
            residual.numel(),
            min(k, residual.numel()),
            out_indices.data_ptr(),
            out_values.data_ptr(),
            out_indices.numel(),
            scale,
        )
    )


def cut_topk(indices: torch.Tensor, values: torch.Tensor, count: int, k: int, residual: torch.Tensor) -> int:
    """Finds the cut by radix select and compacts the pairs in place."""
    if k >= count:
        return count
    return _core.cut_topk(indices.data_ptr(), values.data_ptr(), count, k, residual.data_ptr())


def encode_indices(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
    """Calls the C++ encoder and raises KernelError for the first position that it finds out of order."""
    written = _core.encode_indices(int(codec), indices.data_ptr(), indices.numel(), numel, out.data_ptr())
    if written < 0:
        _refuse_unsorted(written, indices, numel)
    return written


def _refuse_unsorted(written: int, indices: torch.Tensor, numel: int) -> NoReturn:
    at = -1 - written
    raise KernelError(f"indices[{at}] = {int(indices[at])} is not above its predecessor and below numel = {numel}")


def decode_indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor) -> None:
    """Calls the C++ decoder and turns its status into the reference's WireError."""
    status, got, want = _core.decode_indices(
        int(codec), data.data_ptr(), data.numel(), nnz, numel, out_indices.data_ptr()
    )
    if status:
        _raise_wire(status, got, want, nnz, numel)


def _raise_wire(status: int, got: float, want: int, nnz: int = 0, numel: int = 0) -> NoReturn:
    if status == _RICE_BYTES:
        most = want - -(-nnz // 8) + -(-numel // 8)
        raise WireError("index_bytes", int(got), f"must be between {want} and {most} with these parameters")
    if status < _VALUES or status in (20, 23):
        got = int(got)
    field, reason = {
        1: ("index_bytes", f"must be {want}"),
        2: ("nnz", f"must be numel = {want} for the dense codec"),
        3: ("indices", f"must be ascending and below numel = {want}"),
        4: ("indices", "the bits that pad the last byte must be zero"),
        5: ("indices", f"the bitmap must have nnz = {want} ones"),
        6: ("index_params", f"must be at most {want}"),
        7: ("indices", f"must be below numel = {want}"),
        8: ("index_bytes", f"must be at least {want}, one byte a block"),
        10: ("indices", f"the unary stream must have nnz = {want} ones, the last one in its last byte"),
        20: ("value_bytes", f"must be {want}"),
        21: ("value_scale", "must be positive and finite in float32"),
        22: ("value_scale", "must be finite and not negative"),
        23: ("values", "quantized values must be between -127 and 127"),
        24: ("values", "must be finite"),
    }[status]
    raise WireError(field, got, reason)


def encode_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
) -> tuple[int, float]:
    """Rounds, writes and computes the rounding errors in one pass of the C++ code."""
    return _core.encode_values(
        int(codec), values.data_ptr(), values.numel(), out.data_ptr(), 0 if error is None else error.data_ptr()
    )


def decode_values(codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor) -> None:
    """Calls the C++ decoder and turns its status into the reference's WireError."""
    status, got, want = _core.decode_values(
        int(codec), data.data_ptr(), data.numel(), nnz, scale, out_values.data_ptr()
    )
    if status:
        _raise_wire(status, got, want)


def encode_body(
    form: BodyFormat,
    indices: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    error: torch.Tensor | None,
) -> tuple[int, int, float, int]:
    """Writes positions, values and checksum in one call into C++."""
    index_bytes, value_bytes, scale, crc = _core.encode_body(
        int(form.index_codec),
        int(form.value_codec),
        indices.data_ptr(),
        values.data_ptr(),
        values.numel(),
        form.numel,
        out.data_ptr(),
        0 if error is None else error.data_ptr(),
    )
    if index_bytes < 0:
        _refuse_unsorted(index_bytes, indices, form.numel)
    return index_bytes, value_bytes, scale, crc


def decode_body(
    payload: Described, body: torch.Tensor, out_indices: torch.Tensor | None, out_values: torch.Tensor
) -> None:
    """Reads positions and values in one call into C++."""
    nbytes, nnz, numel = body.numel(), payload.nnz, payload.numel
    status, got, want = _core.decode_body(
        int(payload.index_codec),
        int(payload.value_codec),
        body.data_ptr(),
        nbytes,
        min(payload.index_bytes, nbytes),
        nnz,
        numel,
        payload.value_scale,
        out_indices is None,
        0 if out_indices is None else out_indices.data_ptr(),
        out_values.data_ptr(),
    )
    if status:
        _raise_wire(status, got, want, nnz, numel)


def scatter_add(out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Adds in a C++ loop that prefetches the elements ahead."""
    _core.scatter_add(out.data_ptr(), indices.data_ptr(), values.data_ptr(), indices.numel())


def scatter_reduce(out: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float = 1.0) -> None:
    """Works region by region, so that zeroing, adding, scaling and rounding happen in the cache."""
    addresses = [(idx.data_ptr(), val.data_ptr(), val.numel()) for idx, val in parts]
    _core.scatter_reduce(out.data_ptr(), _DTYPE_CODE[out.dtype], out.numel(), addresses, scale)


def add_dense(out: torch.Tensor, data: torch.Tensor) -> None:
    """Adds in a vectorised C++ loop that reads `data` at any alignment."""
    _core.add_dense(out.data_ptr(), data.data_ptr(), out.numel())


def pack_dense(codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None) -> None:
    """Rounds and writes in one pass of the C++ code, and one more for the scale of FP16."""
    to = 0 if error is None else error.data_ptr()
    _core.pack_dense(int(codec), values.data_ptr(), values.numel(), out.data_ptr(), to)


def unpack_dense(codec: ValueCodec, data: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """Decodes, and adds if asked to, in one pass of the C++ code."""
    _core.unpack_dense(int(codec), data.data_ptr(), out.numel(), out.data_ptr(), add)


def accumulate_dense(grad: torch.Tensor, residual: torch.Tensor, scale: float = 1.0) -> int:
    """Accumulates in one pass of the C++ code, with an infinite threshold."""
    code = _DTYPE_CODE[grad.dtype]
    return _core.accumulate_dense(grad.data_ptr(), code, residual.data_ptr(), residual.numel(), scale)


def accumulate_norms(
    grad: torch.Tensor, residual: torch.Tensor, chunk: int, norms: torch.Tensor, scale: float = 1.0
) -> int:
    """Accumulates and sums up piece by piece, while the piece is in the cache."""
    code = _DTYPE_CODE[grad.dtype]
    return _core.accumulate_norms(
        grad.data_ptr(), code, residual.data_ptr(), residual.numel(), scale, chunk, norms.data_ptr()
    )


def crc32c(data: torch.Tensor, seed: int = 0) -> int:
    """Uses the fastest of tables, the SSE4.2 instruction and carry-less products that the CPU has."""
    return _core.crc32c(data.data_ptr(), data.numel(), seed)


def scratch_bytes() -> int:
    """Returns the work space that the C++ selection holds over all threads; 0 without the extension."""
    return 0 if problem else _core.scratch_bytes()


def release_scratch() -> None:
    """Frees the C++ work space of the calling thread; does nothing without the extension."""
    if not problem:
        _core.release_scratch()
