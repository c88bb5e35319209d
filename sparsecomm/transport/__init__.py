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
from sparsecomm.transport.engine import IN_FLIGHT, Engine
from sparsecomm.transport.group import GroupSum
from sparsecomm.transport.virtual import VirtualWorld

__all__ = [
    "IN_FLIGHT",
    "AgreedError",
    "Channel",
    "CollectiveSteps",
    "Engine",
    "GroupSum",
    "Request",
    "SoloTransport",
    "Traffic",
    "Transport",
    "VirtualWorld",
]
