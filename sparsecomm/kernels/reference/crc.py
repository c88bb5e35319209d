"""CRC32C (Castagnoli, reflected, polynomial 0x1EDC6F41) in numpy.

A CRC is linear over GF(2). So the data is cut into lanes of equal length, which advance together, eight bytes a step
by table look-up, and are then joined pairwise. The checksum of a lane followed by m bytes is the lane's checksum times
a fixed 32 x 32 bit matrix ("append m zero bytes"), plus the checksum of those m bytes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["crc32c"]

_U32 = npt.NDArray[np.uint32]
_LANE = 1024
"""Bytes of a lane."""


@lru_cache(maxsize=1)
def _tables() -> _U32:
    """Returns tables of shape (8, 256): row j holds the effect of a byte followed by j zero bytes."""
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = (crc >> np.uint32(1)) ^ (np.uint32(0x82F63B78) * (crc & np.uint32(1)))
    tables = np.empty((8, 256), dtype=np.uint32)
    tables[0] = crc
    for j in range(1, 8):
        prev = tables[j - 1]
        tables[j] = (prev >> np.uint32(8)) ^ crc[prev & np.uint32(0xFF)]
    return tables


def _apply(operator: _U32, states: _U32) -> _U32:
    """Applies a linear operator, given as byte tables of shape (4, 256), to many states at once."""
    out: _U32 = operator[0][states & np.uint32(0xFF)]
    for byte in range(1, 4):
        out = out ^ operator[byte][(states >> np.uint32(8 * byte)) & np.uint32(0xFF)]
    return out


@lru_cache(maxsize=40)
def _append_lanes(level: int) -> _U32:
    """Returns the operator "append 2**level lanes of zero bytes" as byte tables of shape (4, 256)."""
    if level == 0:
        states = (np.arange(256, dtype=np.uint32)[None, :] << (8 * np.arange(4, dtype=np.uint32))[:, None]).ravel()
        zeros = np.zeros(len(states), dtype=np.uint32)
        for _ in range(_LANE // 8):
            states = _step(states, zeros, zeros)
        return states.reshape(4, 256)
    half = _append_lanes(level - 1)
    return _apply(half, half.ravel()).reshape(4, 256)


def _step(states: _U32, low: _U32, high: _U32) -> _U32:
    """Advances each state by eight bytes, given as two little-endian words."""
    t = _tables()
    byte = np.uint32(0xFF)
    a, b = states ^ low, high
    out: _U32 = t[7][a & byte] ^ t[6][(a >> np.uint32(8)) & byte] ^ t[5][(a >> np.uint32(16)) & byte]
    out = out ^ t[4][a >> np.uint32(24)] ^ t[3][b & byte] ^ t[2][(b >> np.uint32(8)) & byte]
    out = out ^ t[1][(b >> np.uint32(16)) & byte] ^ t[0][b >> np.uint32(24)]
    return out


def crc32c(data: torch.Tensor, seed: int = 0) -> int:
    """Advances lanes of 1024 bytes together and joins them pairwise; fewer than 4 bytes go one by one."""
    octets: npt.NDArray[np.uint8] = data.detach().numpy()
    init = np.uint32(~seed & 0xFFFFFFFF)
    if len(octets) < 4:
        crc = int(init)
        for octet in octets:
            crc = (crc >> 8) ^ int(_tables()[0][(crc ^ int(octet)) & 0xFF])
        return ~crc & 0xFFFFFFFF
    # Zero bytes leave a zero state unchanged, so the initial state goes into the data and the padding in front.
    lanes = -(-len(octets) // _LANE)
    levels = (lanes - 1).bit_length()
    padded = np.zeros(lanes * _LANE, dtype=np.uint8)
    start = len(padded) - len(octets)
    padded[start:] = octets
    padded[start : start + 4] ^= np.frombuffer(init.astype("<u4").tobytes(), dtype=np.uint8)
    words = np.ascontiguousarray(padded.view("<u4").reshape(lanes, _LANE // 4).T)
    states = np.zeros(lanes, dtype=np.uint32)
    for i in range(0, _LANE // 4, 2):
        states = _step(states, words[i], words[i + 1])
    states = np.concatenate([np.zeros((1 << levels) - lanes, dtype=np.uint32), states])
    for level in range(levels):
        states = _apply(_append_lanes(level), states[0::2]) ^ states[1::2]
    return ~int(states[0]) & 0xFFFFFFFF
