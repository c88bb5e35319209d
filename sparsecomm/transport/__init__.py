"""Moving bytes between ranks. Importing this package does not import MPI."""

from sparsecomm.transport.base import (
    AgreedError,
    Channel,
    CollectiveSteps,
    Request,
    SoloTransport,
    Traffic,
    Transport,
)
from sparsecomm.transport.engine import Engine
from sparsecomm.transport.post import Post, VirtualOffice
from sparsecomm.transport.virtual import VirtualWorld

__all__ = [
    "AgreedError",
    "Channel",
    "CollectiveSteps",
    "Engine",
    "Post",
    "Request",
    "SoloTransport",
    "Traffic",
    "Transport",
    "VirtualOffice",
    "VirtualWorld",
]
