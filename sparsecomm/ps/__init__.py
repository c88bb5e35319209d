"""Parameter server (docs/parameter-server.md): servers hold parameters in shards; workers pull, compute and push."""

from sparsecomm.ps.job import Outcome, join, run
from sparsecomm.ps.joining import Rendezvous
from sparsecomm.ps.modes import Asynchronous, Mode, StaleSynchronous, Synchronous
from sparsecomm.ps.server.checkpoint import Checkpoints
from sparsecomm.ps.worker.metrics import WorkerMetrics
from sparsecomm.ps.worker.worker import Worker

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
