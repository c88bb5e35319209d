"""The CRC32C checksum, and the check of a body against the header that announced it."""

from __future__ import annotations

import torch

from sparsecomm.errors import WireError
from sparsecomm.kernels import checks
from sparsecomm.kernels.api import Described
from sparsecomm.kernels.paths import kernels_for

__all__ = ["check_body", "crc32c"]


def crc32c(data: torch.Tensor | bytes | bytearray | memoryview, seed: int = 0) -> int:
    """Returns the CRC32C (Castagnoli) checksum, as in iSCSI, ext4 and SSE4.2.

    Args:
        data: a uint8 tensor of shape (n,), or any object with a contiguous byte buffer.
        seed: checksum of the preceding bytes: ``crc32c(b, crc32c(a)) == crc32c(a + b)``.

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
    return kernels_for(data).crc32c(data, seed)


def check_body(payload: Described, body: torch.Tensor) -> None:
    """Checks a body's length and checksum against its description.

    Args:
        payload: description of the body, usually its header.
        body: uint8, on the host.

    Raises:
        WireError: names the sender and bucket.

    Example:
        >>> from types import SimpleNamespace
        >>> body = torch.arange(3, dtype=torch.uint8)
        >>> payload = SimpleNamespace(rank=1, bucket=0, body_bytes=3, body_crc=crc32c(body))
        >>> check_body(payload, body)
        >>> check_body(payload, body[:2])
        Traceback (most recent call last):
        ...
        sparsecomm.errors.WireError: bad payload from rank 1 for bucket 0: length = 2: the header announces 3 bytes
    """
    where = {"rank": payload.rank, "bucket": payload.bucket}
    if body.numel() != payload.body_bytes:
        raise WireError("length", body.numel(), f"the header announces {payload.body_bytes} bytes", **where)
    crc = crc32c(body)
    if crc != payload.body_crc:
        raise WireError("body_crc", hex(payload.body_crc), f"the body's checksum is {crc:#x}", **where)
