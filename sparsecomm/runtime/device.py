"""Order of work on a device: a stream beside the training's, events in place of waiting for the whole device.

On the CPU everything happens at once, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from functools import cache
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["CudaSide", "Inline", "Side", "device_problem", "side_of"]

T = TypeVar("T")


class Side(Protocol):
    """Where the exchanges of one device work, beside the computation of the model."""

    def mark(self) -> Any:
        """Returns what stands for all that the calling thread's current stream was given until now."""

    def active(self, after: Any = None) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which work is queued here, behind what `after` (a mark) stands for."""

    def drive(self, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
        """Returns a generator that goes through `steps` in that context; what is between steps is not in it."""

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Copies to the host and waits until it is there. Returns the target."""

    def read(self, numbers: torch.Tensor) -> Any:
        """Returns a few numbers as `tolist` does. An exchange waits for the device only here and in `fetch`."""


class Inline:
    """The CPU's: everything is done where and when it is called."""

    def mark(self) -> None:
        """See `Side.mark`."""

    def active(self, after: Any = None) -> contextlib.AbstractContextManager[None]:
        """See `Side.active`."""
        return contextlib.nullcontext()

    def drive(self, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
        """See `Side.drive`."""
        return steps

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `Side.fetch`."""
        return target.copy_(source)

    def read(self, numbers: torch.Tensor) -> Any:
        """See `Side.read`."""
        return numbers.tolist()


class CudaSide:
    """A GPU's: one stream for all exchanges of this process on that GPU, so that they follow each other there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        """See `Side.mark`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextlib.contextmanager
    def active(self, after: Any = None) -> Generator[None, None, None]:
        """See `Side.active`."""
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            yield

    def drive(self, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
        """See `Side.drive`."""
        return interleaved(self, steps, after)

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `Side.fetch`. Waits for this copy alone."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        event.synchronize()
        return target

    def read(self, numbers: torch.Tensor) -> Any:
        """See `Side.read`. Through pinned memory: a copy to any other waits for all that the stream was given."""
        room = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        return self.fetch(numbers, room).tolist()


def interleaved(side: Side, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
    """Goes through steps, each inside the side's context; generators of others run between them, outside of it."""
    error: BaseException | None = None
    while True:
        try:
            with side.active(after):
                requests = next(steps) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        after = error = None
        try:
            yield requests
        except GeneratorExit:
            with side.active():
                steps.close()
            raise
        except BaseException as thrown:
            error = thrown


_INLINE = Inline()


@cache
def _cuda_side(device: torch.device) -> CudaSide:
    return CudaSide(device)


def side_of(device: torch.device) -> Side:
    """Returns the side of a device; one a GPU and process."""
    return _cuda_side(device) if device.type == "cuda" else _INLINE


def device_problem(device: torch.device, kernels_problem: str | None) -> str | None:
    """Returns why gradients on a device cannot be exchanged now, or None.

    Args:
        device: of the gradients.
        kernels_problem: why the kernels for a GPU cannot run, or None.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "only on the CPU and on CUDA devices"
    if kernels_problem is not None:
        return f"{kernels_problem}: pip install 'sparsecomm[gpu]'"
    if torch.cuda.is_current_stream_capturing():
        return "the backward pass is being captured into a CUDA graph, and messages between ranks cannot be part of one"
    return None
