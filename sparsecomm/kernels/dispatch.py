"""The one entrance to compute kernels: picks the fastest implementation that this machine can run.

All functions take and fill CPU tensors that the caller allocated, so that a training step allocates nothing.
`reference` (plain numpy) is the truth; every other path equals it bit for bit.

The path is chosen once, at first use: avx512 > avx2 > portable > reference, or what the environment variable
``SPARSECOMM_KERNELS`` names. A path that is asked for and cannot run is an error, never a silent fallback.

Every function checks its tensors and raises KernelError, which names the argument and what it held. Tensors are
contiguous, one-dimensional and on the CPU; indices are uint32 and strictly ascending; values are float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from sparsecomm.errors import ConfigError
from sparsecomm.kernels import checks, native, reference
from sparsecomm.kernels.api import Kernels
from sparsecomm.kernels.sizes import entropy_bits, estimate_index_bytes, max_index_bytes, max_value_bytes
from sparsecomm.types import IndexCodec, SelectResult, TopKResult, ValueCodec

__all__ = [
    "PATHS",
    "accumulate_dense",
    "accumulate_select",
    "add_dense",
    "available_paths",
    "crc32c",
    "current_path",
    "cut_topk",
    "decode_indices",
    "decode_values",
    "encode_indices",
    "encode_values",
    "entropy_bits",
    "estimate_index_bytes",
    "exact_topk",
    "max_index_bytes",
    "max_value_bytes",
    "native_problem",
    "release_scratch",
    "scatter_add",
    "scatter_reduce",
    "scratch_bytes",
    "set_path",
]

PATHS = ("avx512", "avx2", "portable", "reference")
"""All kernel paths, fastest first."""

_ENV = "SPARSECOMM_KERNELS"
_path: str | None = None
_impl: Kernels | None = None


def available_paths() -> tuple[str, ...]:
    """The paths that this installation and this CPU can run, fastest first."""
    return (*native.supported_paths(), "reference")


def native_problem() -> str | None:
    """Why the native kernels cannot be used, or None if they can."""
    return native.problem


def current_path() -> str:
    """The path in use; chooses one if none was chosen yet.

    Raises:
        ConfigError: if ``SPARSECOMM_KERNELS`` names a path that cannot run here.
    """
    _kernels()
    assert _path is not None
    return _path


def set_path(name: str | None) -> None:
    """Switches all kernels, in every thread, to another path: for tests and benches.

    Args:
        name: one of `available_paths()`, or None for the default choice (environment variable, else the fastest).

    Raises:
        ConfigError: if that path does not exist or cannot run here.
    """
    global _path, _impl
    available = available_paths()
    source = "path"
    if name is None:
        name, source = os.environ.get(_ENV) or available[0], _ENV
    if name not in available:
        why = f" ({native.problem})" if name in PATHS and native.problem else ""
        raise ConfigError(f"{source} = {name!r} cannot be used here{why}; available: {', '.join(available)}")
    if name == "reference":
        _impl = reference
    else:
        native.set_path(name)
        _impl = native
    _path = name


def _kernels() -> Kernels:
    if _impl is None:
        set_path(None)
        assert _impl is not None
    return _impl


def accumulate_select(
    grad: torch.Tensor,
    residual: torch.Tensor,
    threshold: float,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    *,
    scale: float = 1.0,
) -> SelectResult:
    """Adds a gradient to the residual and takes out what reaches the threshold, in one pass over memory.

    For every element ``acc = residual + grad * scale`` (product rounded to float32, then the sum: no fused
    multiply-add). If ``acc`` is NaN or infinite the residual is left as it was and the element is counted.
    Otherwise, if ``|acc| >= threshold`` and the output has room, the pair is written and the residual becomes 0;
    else the residual becomes ``acc``.

    Args:
        grad: shape (n,), float32, float16 or bfloat16.
        residual: shape (n,), float32. Mutated.
        threshold: >= 0, may be inf (selects nothing: a plain accumulate), not NaN. 0 selects zeros too.
        out_indices: uint32, shape (capacity,). First `stored` entries are filled, ascending; the rest may be
            overwritten with anything.
        out_values: float32, shape (capacity,). Likewise.
        scale: factor on the gradient, taken as float32.

    Returns:
        How many pairs were stored, how many elements met the threshold, how many were not finite.

    Raises:
        KernelError: for tensors of the wrong dtype, shape, device or layout, or a bad threshold.

    Example:
        >>> r, i, v = torch.tensor([0.5, 0.0, 1.0]), torch.empty(2, dtype=torch.uint32), torch.empty(2)
        >>> accumulate_select(torch.tensor([1.0, 0.25, -3.0]), r, 1.5, i, v)
        SelectResult(stored=2, total=2, nonfinite=0)
        >>> i.tolist(), v.tolist(), r.tolist()
        ([0, 2], [1.5, -2.0], [0.0, 0.25, 0.0])
    """
    n = checks.value_vec("residual", residual)
    if checks.grad_like("grad", grad) != n:
        checks.refuse(f"grad has {grad.numel()} elements, residual {n}: they must be equally long")
    if not threshold >= 0:
        checks.refuse(f"threshold must be at least 0, got {threshold}")
    checks.capacity(out_indices, out_values)
    return (_impl or _kernels()).accumulate_select(grad, residual, threshold, out_indices, out_values, scale)


def exact_topk(
    grad: torch.Tensor | None,
    residual: torch.Tensor,
    k: int,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    *,
    scale: float = 1.0,
) -> TopKResult:
    """Adds a gradient to the residual and takes out exactly the k largest magnitudes.

    ``acc`` is as in `accumulate_select`; NaN and infinities are never selected, and neither are zeros. Among equal
    magnitudes the lowest index wins. The residual becomes 0 where an element was taken and ``acc`` elsewhere, except
    where ``acc`` is not finite: there it is left as it was.

    Args:
        grad: shape (n,), float32, float16 or bfloat16; None selects from the residual as it is.
        residual: shape (n,), float32. Mutated.
        k: >= 0; more than n is the same as n.
        out_indices: uint32, shape (capacity,), capacity >= min(k, n). First `stored` entries are filled, ascending;
            the rest may be overwritten with anything.
        out_values: float32, shape (capacity,). Likewise.
        scale: factor on the gradient, taken as float32.

    Returns:
        How many were stored, the smallest selected magnitude, how many elements were not finite.

    Raises:
        KernelError: for tensors of the wrong dtype, shape, device or layout, a negative k, or too little room.

    Example:
        >>> r, i, v = torch.tensor([1.0, -4.0, 4.0, 0.0]), torch.empty(2, dtype=torch.uint32), torch.empty(2)
        >>> exact_topk(torch.tensor([1.0, 0.0, -1.0, 0.0]), r, 2, i, v)
        TopKResult(stored=2, threshold=3.0, nonfinite=0)
        >>> i.tolist(), v.tolist(), r.tolist()
        ([1, 2], [-4.0, 3.0], [2.0, 0.0, 0.0, 0.0])
    """
    n = checks.value_vec("residual", residual)
    if grad is not None and checks.grad_like("grad", grad) != n:
        checks.refuse(f"grad has {grad.numel()} elements, residual {n}: they must be equally long")
    checks.count("k", k)
    room = checks.capacity(out_indices, out_values)
    if room < min(k, n):
        checks.refuse(f"out_indices and out_values have room for {room}, need min(k, n) = {min(k, n)}")
    return (_impl or _kernels()).exact_topk(grad, residual, k, out_indices, out_values, scale)


def cut_topk(indices: torch.Tensor, values: torch.Tensor, count: int, k: int, residual: torch.Tensor) -> int:
    """Keeps the k largest magnitudes of the first `count` pairs and puts the others back into the residual.

    Among equal magnitudes the lowest index wins. What is kept is compacted in place, in order.

    Args:
        indices: uint32, shape (capacity,), the first `count` ascending and below residual.numel(). Mutated.
        values: float32, shape (capacity,). Mutated.
        count: number of pairs.
        k: how many to keep.
        residual: float32, shape (n,). ``residual[index] = value`` for what is dropped. Mutated.

    Returns:
        The new number of pairs, min(count, k).

    Raises:
        KernelError: for tensors of the wrong dtype, shape, device or layout, or counts that do not fit.

    Example:
        >>> i, v = torch.tensor([0, 2, 3], dtype=torch.uint32), torch.tensor([1.0, -3.0, 2.0])
        >>> r = torch.zeros(4)
        >>> cut_topk(i, v, 3, 2, r), i[:2].tolist(), v[:2].tolist(), r.tolist()
        (2, [2, 3], [-3.0, 2.0], [1.0, 0.0, 0.0, 0.0])
    """
    checks.count("count", count, checks.capacity(indices, values))
    checks.count("k", k)
    checks.value_vec("residual", residual)
    return (_impl or _kernels()).cut_topk(indices, values, count, k, residual)


def encode_indices(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
    """Writes ascending positions as bytes, in the format that docs/wire-format.md specifies.

    Args:
        codec: how to write them.
        indices: uint32, shape (nnz,), strictly ascending, below numel; for DENSE exactly 0..numel-1.
        numel: length of the dense vector, at most 2**32.
        out: uint8, at least ``max_index_bytes(codec, nnz, numel)`` long. Bytes behind what is returned may be
            overwritten with anything.

    Returns:
        Bytes written.

    Raises:
        KernelError: for unfit tensors, too small an output, or indices that are not ascending and below numel.

    Example:
        Gaps minus one 2, 0, 3 need two bits each, 2 | 0 << 2 | 3 << 4 = 0x32:

        >>> out = torch.empty(8, dtype=torch.uint8)
        >>> encode_indices(IndexCodec.BITPACK, torch.tensor([2, 3, 7], dtype=torch.uint32), 10, out)
        2
        >>> out[:2].tolist()
        [2, 50]
    """
    nnz = checks.index_vec("indices", indices)
    need = max_index_bytes(codec, nnz, numel)
    if checks.byte_vec("out", out) < need:
        checks.refuse(f"out has {out.numel()} bytes, {codec!r} may need {need}")
    if codec == IndexCodec.DENSE and nnz != numel:
        checks.refuse(f"the dense codec needs nnz == numel, got nnz = {nnz}, numel = {numel}")
    return (_impl or _kernels()).encode_indices(codec, indices, numel, out)


def decode_indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor) -> None:
    """Reads positions written by `encode_indices`; trusts nothing in `data`, `nnz` and `numel`.

    Args:
        codec: how they were written.
        data: uint8, exactly the encoded bytes.
        nnz: number of positions, from the header.
        numel: length of the dense vector, from the header.
        out_indices: uint32, at least nnz long; the first nnz are filled, or hold garbage after an error.

    Raises:
        WireError: if the bytes are not a strictly ascending list of nnz positions below numel in this codec: wrong
            length, parameters out of range, too many or too few positions, padding bits that are not zero.
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.empty(3, dtype=torch.uint32)
        >>> decode_indices(IndexCodec.BITMAP, torch.tensor([0b10001100, 0], dtype=torch.uint8), 3, 10, out)
        >>> out.tolist()
        [2, 3, 7]
    """
    checks.wire_counts(nnz, numel)
    checks.byte_vec("data", data)
    if checks.index_vec("out_indices", out_indices) < nnz:
        checks.refuse(f"out_indices has {out_indices.numel()} elements, need nnz = {nnz}")
    (_impl or _kernels()).decode_indices(codec, data, nnz, numel, out_indices)


def encode_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None = None
) -> tuple[int, float]:
    """Writes values as bytes, and what the rounding cost to `error`, so that it can return to the residual.

    Args:
        codec: how to write them.
        values: float32, shape (nnz,), finite.
        out: uint8, at least ``max_value_bytes(codec, nnz)`` long. Mutated.
        error: float32, at least nnz long, receives value minus decoded value (in float32; exact for FP16 and BF16);
            None if nobody wants it. May be `values` itself.

    Returns:
        Bytes written, and the scale that `decode_values` needs (a power of two for FP16, else 1).

    Raises:
        KernelError: for unfit tensors or too small an output.

    Example:
        >>> out, error = torch.empty(4, dtype=torch.uint8), torch.empty(2)
        >>> encode_values(ValueCodec.BF16, torch.tensor([1.0, 1.00390625]), out, error)  # 1 + 2**-8 ties to even
        (4, 1.0)
        >>> out.tolist(), error.tolist()
        ([128, 63, 128, 63], [0.0, 0.00390625])
    """
    nnz = checks.value_vec("values", values)
    need = max_value_bytes(codec, nnz)
    if checks.byte_vec("out", out) < need:
        checks.refuse(f"out has {out.numel()} bytes, {codec!r} needs {need}")
    if error is not None and checks.value_vec("error", error) < nnz:
        checks.refuse(f"error has {error.numel()} elements, need nnz = {nnz}")
    return (_impl or _kernels()).encode_values(codec, values, out, error)


def decode_values(codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor) -> None:
    """Reads values written by `encode_values`; trusts nothing in `data` and `scale`.

    Args:
        codec: how they were written.
        data: uint8, exactly the encoded bytes.
        nnz: number of values.
        scale: what `encode_values` returned; only FP16 looks at it.
        out_values: float32, at least nnz long; the first nnz are filled, or hold garbage after an error.

    Raises:
        WireError: for a wrong length, a scale that is not finite and positive (INT8 block scales may be 0), an INT8
            -128, or values that are not finite.
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.empty(2)
        >>> decode_values(ValueCodec.FP16, torch.tensor([0, 60, 0, 192], dtype=torch.uint8), 2, 0.5, out)
        >>> out.tolist()  # halves 1.0 and -2.0
        [0.5, -1.0]
    """
    checks.count("nnz", nnz)
    checks.byte_vec("data", data)
    if checks.value_vec("out_values", out_values) < nnz:
        checks.refuse(f"out_values has {out_values.numel()} elements, need nnz = {nnz}")
    (_impl or _kernels()).decode_values(codec, data, nnz, scale, out_values)


def scatter_add(out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Adds sparse values into a dense vector: ``out[indices] += values``.

    Args:
        out: float32, shape (n,). Mutated.
        indices: uint32, shape (nnz,), strictly ascending, below n: trusted, not checked.
        values: float32, shape (nnz,).

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.ones(3)
        >>> scatter_add(out, torch.tensor([0, 2], dtype=torch.uint32), torch.tensor([0.5, -1.0]))
        >>> out.tolist()
        [1.5, 1.0, 0.0]
    """
    checks.value_vec("out", out)
    if checks.index_vec("indices", indices) != checks.value_vec("values", values):
        checks.refuse(f"indices has {indices.numel()} elements, values {values.numel()}: must be equally long")
    (_impl or _kernels()).scatter_add(out, indices, values)


def scatter_reduce(
    out: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], *, scale: float = 1.0
) -> None:
    """Sets a dense vector to the scaled sum of sparse ones, in their order, so that all ranks agree bit for bit.

    Each element starts as float32 0, each part that has it is added in the order given, the sum is multiplied by
    `scale` and rounded to nearest even into the dtype of `out`.

    Args:
        out: float32, float16 or bfloat16, shape (n,). Overwritten.
        parts: pairs of indices (uint32, strictly ascending, below n: trusted) and values (float32).
        scale: factor on the sums, taken as float32.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.empty(3)
        >>> one = (torch.tensor([0, 2], dtype=torch.uint32), torch.tensor([1.0, 2.0]))
        >>> two = (torch.tensor([2], dtype=torch.uint32), torch.tensor([4.0]))
        >>> scatter_reduce(out, [one, two], scale=0.5)
        >>> out.tolist()
        [0.5, 0.0, 3.0]
    """
    checks.grad_like("out", out)
    for indices, values in parts:
        if checks.index_vec("indices", indices) != checks.value_vec("values", values):
            checks.refuse(f"a part has {indices.numel()} indices but {values.numel()} values")
    (_impl or _kernels()).scatter_reduce(out, parts, scale)


def add_dense(out: torch.Tensor, data: torch.Tensor) -> None:
    """Adds a dense vector, or its bytes as they came off the wire: ``out += data``.

    Args:
        out: float32, shape (n,). Mutated.
        data: float32, shape (n,), or uint8, shape (4 * n,), little-endian, at any alignment.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.ones(2)
        >>> add_dense(out, torch.tensor([0.5, 2.0]).view(torch.uint8))
        >>> out.tolist()
        [1.5, 3.0]
    """
    n = checks.value_vec("out", out)
    if data.dtype is torch.uint8:
        if checks.byte_vec("data", data) != 4 * n:
            checks.refuse(f"data has {data.numel()} bytes, need 4 * {n}")
    elif checks.value_vec("data", data) != n:
        checks.refuse(f"data has {data.numel()} elements, out {n}: they must be equally long")
    (_impl or _kernels()).add_dense(out, data)


def accumulate_dense(grad: torch.Tensor, residual: torch.Tensor, *, scale: float = 1.0) -> int:
    """Adds a gradient to the residual and selects nothing: ``residual += grad * scale`` where that is finite.

    Args:
        grad: shape (n,), float32, float16 or bfloat16.
        residual: shape (n,), float32. Mutated.
        scale: factor on the gradient, taken as float32.

    Returns:
        How many sums were NaN or infinite; there the residual is left as it was.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> r = torch.tensor([1.0, 2.0])
        >>> accumulate_dense(torch.tensor([0.5, float("inf")]), r), r.tolist()
        (1, [1.5, 2.0])
    """
    n = checks.value_vec("residual", residual)
    if checks.grad_like("grad", grad) != n:
        checks.refuse(f"grad has {grad.numel()} elements, residual {n}: they must be equally long")
    return (_impl or _kernels()).accumulate_dense(grad, residual, scale)


def crc32c(data: torch.Tensor | bytes | bytearray | memoryview, seed: int = 0) -> int:
    """The CRC32C (Castagnoli) checksum, as in iSCSI, ext4 and SSE4.2.

    Args:
        data: a uint8 tensor of shape (n,), or anything with a contiguous byte buffer.
        seed: the checksum of what came before: ``crc32c(b, crc32c(a)) == crc32c(a + b)``.

    Raises:
        KernelError: for an unfit tensor or a seed that is not 32 bits.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    checks.count("seed", seed, 0xFFFFFFFF)
    if not isinstance(data, torch.Tensor):
        data = checks.borrowed_bytes(data)
    checks.byte_vec("data", data)
    return (_impl or _kernels()).crc32c(data, seed)


def scratch_bytes() -> int:
    """Bytes of work space that the native kernels hold over all threads: it only grows, up to about 10 bytes * k."""
    return native.scratch_bytes()


def release_scratch() -> None:
    """Frees the work space of the calling thread; the next exact_topk allocates it again."""
    native.release_scratch()
