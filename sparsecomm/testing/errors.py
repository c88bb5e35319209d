"""The error that checks of a compressor raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

__all__ = ["ContractError", "attempt", "refuse"]

_T = TypeVar("_T")


class ContractError(AssertionError):
    """A compressor breaks the contract. The message names the broken rule and the input."""


def refuse(message: str) -> NoReturn:
    """Raises a `ContractError`."""
    raise ContractError(message)


def attempt(name: str, call: Callable[[], _T], case: str) -> _T:
    """Returns the result of a call, or raises an error that names the call and the input.

    Args:
        name: name of the function, for the message.
        call: the call; takes no arguments.
        case: describes the input, for the message.

    Raises:
        ContractError: if the call raised; its error is the cause.
    """
    try:
        return call()
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{name} raised {type(error).__name__}: {error} ({case})") from error
