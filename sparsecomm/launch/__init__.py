"""Turns a launcher's environment into a world of ranks that can communicate."""

from sparsecomm.launch.detect import Launch, detect, without_launcher
from sparsecomm.launch.world import (
    World,
    call_at_end,
    default_timeout,
    init,
    is_initialized,
    join_for_torch,
    shutdown,
    world,
)

__all__ = [
    "Launch",
    "World",
    "call_at_end",
    "default_timeout",
    "detect",
    "init",
    "is_initialized",
    "join_for_torch",
    "shutdown",
    "without_launcher",
    "world",
]
