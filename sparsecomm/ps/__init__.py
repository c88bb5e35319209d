"""Parameter server: servers hold the parameters in shards, workers pull, compute and push. docs/parameter-server.md."""

from sparsecomm.ps.job import Outcome, join, run
from sparsecomm.ps.joining import Rendezvous
from sparsecomm.ps.modes import Asynchronous, Mode, StaleSynchronous, Synchronous
from sparsecomm.ps.server.checkpoint import Checkpoints
from sparsecomm.ps.worker.worker import Worker, WorkerMetrics

__all__ = [
    "Asynchronous",
    "Checkpoints",
    "Mode",
    "Outcome",
    "Rendezvous",
    "StaleSynchronous",
    "Synchronous",
    "Worker",
    "WorkerMetrics",
    "join",
    "run",
]
