"""Compiles each form in which the kernels are started, without a GPU; prints the forms as JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from sparsecomm.errors import SparseCommError
from sparsecomm.kernels.triton import (
    combine as triton_combine,
)
from sparsecomm.kernels.triton import (
    indices as triton_indices,
)
from sparsecomm.kernels.triton import (
    path as triton_path,
)
from sparsecomm.kernels.triton import (
    positions as triton_positions,
)
from sparsecomm.kernels.triton import (
    select as triton_select,
)
from sparsecomm.kernels.triton import (
    topk as triton_topk,
)
from sparsecomm.kernels.triton import (
    values as triton_values,
)
from sparsecomm.types import GRAD_DTYPES, IndexCodec, ValueCodec

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
FORMS: dict[tuple[Any, ...], tuple[ASTSource, dict[str, Any]]] = {}


def only_note(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
    """Replaces `launch`: records the form in which a kernel would be started."""
    if programs == 0:
        return
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.dtype is torch.float32:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = ("i64" if value >= 2**31 else "i32") if isinstance(value, int) else "fp32"
    key = (kernel.__name__, *signature.items(), *constants.items())
    if key in FORMS:
        return
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    FORMS[key] = source, {"num_warps": warps, "enable_fp_fusion": False}


def compiled(number: int) -> dict[str, Any]:
    """Compiles a form."""
    source, options = list(FORMS.values())[number]
    made, name = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options), source.fn.__name__
    registers, spilled = resources(made.asm["ptx"]) if name in ("_select", "_gather", "_collect") else (0, 0)
    return {"name": name, "fused": "fma.rn" in made.asm["ptx"], "registers": registers, "spilled": spilled}


def resources(ptx: str) -> tuple[int, int]:
    """Returns registers of a thread and bytes spilled, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)
        assert target is not None
        command = [
            get_ptxas(90).path,
            "-v",
            f"--gpu-name={target.group(1)}",
            "-lineinfo",
            "--fmad=false",
            str(path),
        ]
        command += ["-o", str(path.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = done.stderr
    registers = re.search(r"Used (\d+) registers", told)
    spills = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill", told)]
    return int(registers.group(1)) if registers else -1, sum(spills)


def main() -> None:
    for module in (triton_select, triton_topk, triton_indices, triton_positions, triton_values, triton_combine):
        module.launch = only_note
    # Nothing is computed, so results are meaningless, and decoders may refuse the bytes that they "read".
    n, k, path = 70_000, 100, triton_path
    residual = torch.zeros(n, dtype=torch.float32)
    values = torch.zeros(k, dtype=torch.float32)
    out = torch.zeros(8 * n, dtype=torch.uint8)
    indices = torch.arange(k, dtype=torch.int64).to(torch.uint32)
    for dtype in GRAD_DTYPES:
        grad, scale = torch.zeros(n, dtype=dtype), 0.5 if dtype is torch.float16 else 1.0
        path.accumulate_select(grad, residual, 1.0, indices, values, scale)
        if dtype is torch.float32:  # other dtypes differ only in `accumulated`, which has just been compiled for all
            path.exact_topk(grad, residual, k, indices, values, scale)
        path.accumulate_dense(grad, residual, scale)
        path.scatter_reduce(grad, [(indices, values)], scale)
    path.exact_topk(None, residual, k, indices, values)
    path.accumulate_norms(grad, residual, 1000, torch.empty(70, dtype=torch.float32))
    path.scatter_add(residual, indices, values)
    path.cut_topk(indices, values, k, 50, residual)
    for codec in IndexCodec:
        with suppress(SparseCommError):
            path.encode_indices(codec, torch.arange(k, dtype=torch.int64).to(torch.uint32), n, out)
        with suppress(SparseCommError):
            path.decode_indices(codec, torch.zeros(4 * k if codec == 1 else n // 8, dtype=torch.uint8), k, n, indices)
    for value_codec in ValueCodec:
        path.encode_values(value_codec, values, out, values)
        with suppress(SparseCommError):
            size = triton_values.max_value_bytes(value_codec, k)
            path.decode_values(value_codec, out[:size], k, 1.0, values)
        if value_codec != ValueCodec.INT8:
            path.pack_dense(value_codec, values, out, None)
            path.unpack_dense(value_codec, out, values, True)
    # Forked processes inherit the forms.
    with multiprocessing.get_context("fork").Pool(min(4, os.cpu_count() or 1)) as pool:
        print(json.dumps(pool.map(compiled, range(len(FORMS)), chunksize=1)))


if __name__ == "__main__":
    main()
