"""`collective="auto"`: measured costs, predictions for every bucket, trials of the best few, one decision.

chooser.py lists the steps. These are the decisions behind them:

- All ranks measure together and keep the slowest rank's figures, so that all predict the same. Everything is counted
  in steps, so all ranks measure, try and decide in the same ones. Figures travel in two exchanges of a few bytes that
  begin with the usual header: a rank that does not choose is found like any other mismatch.
- Whole steps are timed, since an exchange's own seconds say little: most of them hide under backward, and hidden work
  takes cores from it. The medians of the slowest rank count.
- Candidates within 1.6 times the best prediction are tried, and no compression within 4 times, in turns of five real
  steps. No compression is always a candidate: the process group's own allreduce ("native"), this package's in float32,
  and in 16 bits with the rounding kept. In float32 it wins where nothing is 2% faster, for no gradient waits in a
  residual then.
- When the number of nonzeros has halved or doubled, as in a warm-up, it predicts and tries again.
- A choice depends on timing, so two runs may differ. Where bits must be reproducible, name a collective.
- Between nodes it measures messages around a ring that goes from node to node, so that all ranks of a node use its
  link at once, and around one inside each node.
- A compressor that needs a method of its own (`Compressor.collectives`) gets that, without a choice.
"""

from sparsecomm.exchange.auto.chooser import Chooser
from sparsecomm.exchange.auto.predict import NATIVE, Candidate, candidates

__all__ = ["NATIVE", "Candidate", "Chooser", "candidates"]
