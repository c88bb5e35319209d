"""How a check says what is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

__all__ = ["ContractError", "refuse", "told"]

_T = TypeVar("_T")


class ContractError(AssertionError):
    """A compressor breaks the contract; the message says which part, and for which input."""


def refuse(message: str) -> NoReturn:
    """Raises a `ContractError`."""
    raise ContractError(message)


def told(name: str, call: Callable[[], _T], where: str) -> _T:
    """Returns what a call returns, or says which one failed.

    Args:
        name: of what is called.
        call: takes no arguments.
        where: for which input.

    Raises:
        ContractError: with what the call raised as its cause.
    """
    try:
        return call()
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{name} raised {type(error).__name__}: {error} ({where})") from error
