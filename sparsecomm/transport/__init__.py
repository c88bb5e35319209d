"""Moving bytes between ranks. Importing this package does not import MPI."""

from sparsecomm.transport.backoff import Backoff
from sparsecomm.transport.base import (
    AgreedError,
    Channel,
    CollectiveSteps,
    Request,
    SoloTransport,
    Traffic,
    Transport,
)
from sparsecomm.transport.engine import IN_FLIGHT, Engine
from sparsecomm.transport.group import GroupSum
from sparsecomm.transport.mailbox.base import Post
from sparsecomm.transport.simulated import VirtualWorld

__all__ = [
    "IN_FLIGHT",
    "AgreedError",
    "Backoff",
    "Channel",
    "CollectiveSteps",
    "Engine",
    "GroupSum",
    "Post",
    "Request",
    "SoloTransport",
    "Traffic",
    "Transport",
    "VirtualWorld",
]
