"""sparsecomm: sparse gradient communication for PyTorch data-parallel training over MPI.

```
import sparsecomm as sc

sc.init()
ddp = torch.nn.parallel.DistributedDataParallel(model)
state = sc.SparseState(sc.TopK(density=0.01))
ddp.register_comm_hook(state, sc.sparse_hook)
```
"""

from importlib.metadata import PackageNotFoundError, version

from sparsecomm import backend, optim, ps
from sparsecomm.compress import (
    ChunkTopK,
    Compressor,
    Constant,
    CyclicTopK,
    Dense,
    Geometric,
    PowerSGD,
    RandomK,
    Selection,
    SelectionBuffers,
    SelectorMemory,
    Sign,
    ThresholdTopK,
    TopK,
    Warmup,
)
from sparsecomm.ddp import Convergence, SparseState, allreduce_gradients, average_replicas, reshard, sparse_hook
from sparsecomm.errors import (
    CollectiveMismatch,
    CommTimeout,
    ConfigError,
    ConvergenceWarning,
    LaunchError,
    RankLeft,
    RemoteError,
    SparseCommError,
    StateError,
    TransportError,
    WireError,
)
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import AdamCorrection, ErrorFeedback, MomentumCorrection
from sparsecomm.launch import World, init, is_initialized, shutdown, world
from sparsecomm.presets import preset
from sparsecomm.runtime.metrics import BucketReport, Metrics

backend.register()

try:
    __version__ = version("sparsecomm")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AdamCorrection",
    "BucketReport",
    "ChunkTopK",
    "CollectiveMismatch",
    "CommTimeout",
    "Compressor",
    "ConfigError",
    "Constant",
    "Convergence",
    "ConvergenceWarning",
    "CyclicTopK",
    "Dense",
    "ErrorFeedback",
    "Geometric",
    "LaunchError",
    "Metrics",
    "MomentumCorrection",
    "PowerSGD",
    "RandomK",
    "RankLeft",
    "RemoteError",
    "Selection",
    "SelectionBuffers",
    "SelectorMemory",
    "Sign",
    "SparseCommError",
    "SparseConfig",
    "SparseState",
    "StateError",
    "ThresholdTopK",
    "TopK",
    "TransportError",
    "Warmup",
    "WireError",
    "World",
    "allreduce_gradients",
    "average_replicas",
    "backend",
    "init",
    "is_initialized",
    "optim",
    "preset",
    "ps",
    "reshard",
    "shutdown",
    "sparse_hook",
    "world",
]
