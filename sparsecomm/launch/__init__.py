"""From a launcher's environment to a world of ranks that can talk."""

from sparsecomm.launch.detect import Launch, detect, without_launcher
from sparsecomm.launch.world import World, default_timeout, init, is_initialized, shutdown, world

__all__ = [
    "Launch",
    "World",
    "default_timeout",
    "detect",
    "init",
    "is_initialized",
    "shutdown",
    "without_launcher",
    "world",
]
