"""Moves bytes between ranks. Importing this package does not import MPI."""

from sparsecomm.transport.backoff import Backoff
from sparsecomm.transport.base import (
    AgreedError,
    Channel,
    CollectiveSteps,
    GroupLink,
    Link,
    Request,
    SoloTransport,
    Traffic,
    Transport,
)
from sparsecomm.transport.engine import Engine
from sparsecomm.transport.group import GroupSum
from sparsecomm.transport.mailbox.base import Mailbox
from sparsecomm.transport.simulated import SimulatedWorld
from sparsecomm.transport.task import IN_FLIGHT, Outside, Task

__all__ = [
    "IN_FLIGHT",
    "AgreedError",
    "Backoff",
    "Channel",
    "CollectiveSteps",
    "Engine",
    "GroupLink",
    "GroupSum",
    "Link",
    "Mailbox",
    "Outside",
    "Request",
    "SimulatedWorld",
    "SoloTransport",
    "Task",
    "Traffic",
    "Transport",
]
