"""Single entries of a state dict: every one is checked for itself, and refused by its key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypeGuard

import torch

from sparsecomm.compress.base import SelectorMemory
from sparsecomm.errors import StateError
from sparsecomm.feedback import Alignment, Squares, check_residuals
from sparsecomm.runtime.kinds import tensor_problem

__all__ = ["alignment_of", "as_state_dict", "count_of", "layout_hash_of", "memory_of", "selector_of"]

_MOST = 2**53  # whole numbers up to here are exact in float64, and no run counts further
_LAYOUT = re.compile(r"[0-9a-f]{16}")
_SHOWN = 80  # characters of a value in an error


def as_state_dict(state_dict: object) -> Mapping[str, object]:
    """Returns the argument if it is a mapping whose keys are strings.

    Raises:
        StateError: if it is not.
    """
    if not isinstance(state_dict, Mapping):
        raise StateError(f"a state dict must be a dict of tensors, got {type(state_dict).__name__}")
    strange = [key for key in state_dict if not isinstance(key, str)]
    if strange:
        raise StateError(f"the keys of a state dict must be strings, got {_shown(strange[0])}")
    return state_dict


def count_of(key: str, value: object) -> int:
    """Returns a whole number >= 0, saved as one int64.

    Raises:
        StateError: if the value is none.
    """
    if _is_tensor(value, torch.int64) and value.numel() == 1 and 0 <= int(value) <= _MOST:
        return int(value)
    raise StateError(f"the checkpoint's {key!r} must be one whole number >= 0 as int64, got {_shown(value)}")


def memory_of(kind: str, name: str, value: object) -> torch.Tensor:
    """Returns a parameter's residual or moment, without its gradient's history.

    Raises:
        StateError: if the value is none, or a second moment is negative.
    """
    check_residuals(kind, {name: value})
    assert isinstance(value, torch.Tensor)
    if kind == "second_moment" and bool((value < 0).any()):
        raise StateError(f"second_moment of {name!r} holds negative values")
    return value.detach()


def layout_hash_of(key: str, prefix: str) -> int:
    """Returns the layout hash in a key.

    Raises:
        StateError: if there is none.
    """
    digits = key.removeprefix(prefix)
    if not _LAYOUT.fullmatch(digits):
        raise StateError(f"the checkpoint's {key!r} does not name a layout by 16 hexadecimal digits")
    return int(digits, 16)


def selector_of(key: str, value: object) -> SelectorMemory:
    """Returns a compressor's memory of a bucket, saved as three float64.

    Raises:
        StateError: if the value is none.
    """
    if _is_tensor(value, torch.float64) and value.shape == (3,):
        threshold, age, k = value.tolist()
        if (math.isnan(threshold) or 0 <= threshold < math.inf) and _is_count(age) and _is_count(k):
            return SelectorMemory(threshold, int(age), int(k))
    raise StateError(f"the checkpoint's {key!r} must hold a threshold, its age and its k, got {_shown(value)}")


def alignment_of(key: str, value: object) -> Alignment:
    """Returns how far the ranks agreed in a bucket, saved as six float64.

    Raises:
        StateError: if the value is none.
    """
    if _is_tensor(value, torch.float64) and value.shape == (6,):
        size, count, *squares = value.tolist()
        if _is_count(size) and size >= 1 and _is_count(count) and all(0 <= x < math.inf for x in squares):
            return Alignment(int(size), int(count), Squares(*squares[:2]), Squares(*squares[2:]))
    raise StateError(
        f"the checkpoint's {key!r} must hold ranks, measurements and four squared norms, got {_shown(value)}"
    )


def _is_tensor(value: object, dtype: torch.dtype) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dtype == dtype and tensor_problem(value) is None


def _is_count(x: float) -> bool:
    return 0 <= x <= _MOST and x == int(x)


def _shown(value: object) -> str:
    """Returns a value for an error; of a large tensor only its kind."""
    if isinstance(value, torch.Tensor):
        kind, problem = f"{str(value.dtype).removeprefix('torch.')} tensor", tensor_problem(value)
        if problem is not None:  # which may have no shape
            return f"a {kind} that {problem}"
        return f"a {kind} of shape {tuple(value.shape)}" + (f": {value.tolist()}" if value.numel() <= 6 else "")
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({type(value).__name__})"
