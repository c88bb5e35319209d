"""Two levels: a dense sum inside each node, a sparse exchange between the nodes' leaders.

method.py lists the steps. These are the decisions behind them:

- MPI's Split_type says which ranks share memory (over Gloo, the machines' boot ids do), once, in `init`. Every
  transport and channel then knows the node of every rank. `init(nodes=...)` or `SPARSECOMM_NODES=0,0,1,1` gives nodes
  instead, to try them on one machine. Nodes may be uneven and their ranks anywhere. A tag of them is in the header, so
  that ranks with other nodes are found.
- The lowest rank of a node leads. It adds its node's accumulated gradients in rank order, selects from the sum, and
  exchanges the selection with the other leaders by the pipeline itself, on a channel of the leaders: sparse allgather
  or split-reduce, whichever moves fewer bytes. Codecs, checks, error feedback and regions are those of the inner
  method.
- The residual lives with the leader. Each rank contributes gradient and residual and has an empty residual afterwards.
  `k` is of a node's sum. Momentum stays with each rank and is masked where the leader has selected.
- The result is shared as a payload in float32, or as all values where that is smaller. A failure or a non-finite sum
  that only leaders see travels in its header: all ranks raise, or skip, alike.
- On one node nothing is compressed: a dense allreduce in float32, which leaves no residual.
- A rank that does not lead sends 4 n bytes in shared memory, and they count. `bytes_sent` is for leaders that are
  alone on their nodes; `two_level_bytes` is told the nodes, and counts the bytes that a leader sends inside its own.
- `inner_group=` (a torch process group of the node's ranks; NCCL on GPUs) carries the sum inside the node instead. A
  process group wants the same order of calls on all ranks, so exchanges queue for it in the order in which they began.
  One group serves one state.
"""

from sparsecomm.exchange.methods.two_level.method import TwoLevel

__all__ = ["TwoLevel"]
