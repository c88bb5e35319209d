"""Order of work on a device. On a GPU, exchanges run on a separate stream and wait for events, not for the device.

On the CPU every call is complete when it returns, so no ordering is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from typing_extensions import override

__all__ = ["CudaSide", "Inline", "Side", "device_problem", "side_of"]

T = TypeVar("T")


class Side(Protocol):
    """Place for the work of exchanges on one device, apart from the computation of the model."""

    def mark(self) -> Any:
        """Returns a mark of all work queued so far on the current stream of the calling thread."""

    def active(self, after: Any = None) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which work is queued on this side, behind the work of the mark `after`."""

    def drive(self, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
        """Returns a generator that runs each step of `steps` inside that context, and nothing else."""

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Copies a tensor to the host and waits until it has arrived. Returns the target."""

    def read(self, numbers: torch.Tensor) -> Any:
        """Returns a few numbers as `tolist` does. Exchanges wait for the device only here and in `fetch`."""


class Inline(Side):
    """The side of the CPU. Work is done where and when it is called."""

    @override
    def mark(self) -> None:
        return None

    @override
    def active(self, after: Any = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @override
    def drive(self, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
        return steps

    @override
    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target.copy_(source)

    @override
    def read(self, numbers: torch.Tensor) -> Any:
        return numbers.tolist()


class CudaSide(Side):
    """The side of a GPU: one stream for all exchanges of this process on that GPU, on which they run in order.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @override
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    @override
    @contextlib.contextmanager
    def active(self, after: Any = None) -> Generator[None, None, None]:
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            yield

    @override
    def drive(self, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
        return interleaved(self, steps, after)

    @override
    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Copies a tensor to the host and waits for this copy alone. Returns the target."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        event.synchronize()
        return target

    @override
    def read(self, numbers: torch.Tensor) -> Any:
        # A copy to memory that is not pinned would wait for all work of the stream.
        pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        return self.fetch(numbers, pinned).tolist()


def interleaved(side: Side, steps: Generator[Any, Any, T], after: Any) -> Generator[Any, Any, T]:
    """Runs each step of a generator inside the context of a side. Other generators run between steps, outside of it."""
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
    """Returns the side of a device. A process has one side per GPU."""
    return _cuda_side(device) if device.type == "cuda" else _INLINE


def device_problem(device: torch.device, kernels_problem: str | None) -> str | None:
    """Returns why gradients on a device cannot be exchanged now, or None if they can.

    Args:
        device: Device of the gradients.
        kernels_problem: Why the GPU kernels cannot run, or None if they can.
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
