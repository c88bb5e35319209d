"""Split-reduce: a sparse allreduce whose bytes do not grow with the number of ranks, for any number of ranks.

steps.py lists the steps. These are the decisions behind them:

- Regions come from quantiles. Each rank contributes 16 to 128 quantiles of its positions. All ranks add the
  distributions that these describe and cut the sum into P equal regions. Ok-Topk averages the ranks' own boundaries
  instead, which fails where each rank is large in another place. Ranks take their quantiles at different offsets, so
  that P ranks with the same positions contribute P times as many different samples.
- A region goes to the rank with the most samples in it. Values that are there already need not travel: where every
  rank is large in a place of its own, the first leg sends next to nothing.
- Regions are remembered for 64 steps in the bucket's memory. They are gone with its layout, with a checkpoint, or when
  steps are missing or k has changed by more than twice. Their tag is in the header: if one rank's differs, all make
  new ones.
- The threshold comes from quantiles, too, and not from a histogram: the code is the same, and the result is exact to
  1/s of a rank's list wherever the magnitudes lie. In later steps it follows the observed count. If the count leaves
  2k/3 .. 4k/3, a new threshold is found in the same step, so that gradients that jump do not flood the last leg. All
  ranks decide from the same announced counts.
- Dropped sums stay in their owner's residual, for all ranks together, and so does the rounding of the kept sums. None
  of it is written before the exchange has succeeded.
- The last leg forwards blocks (Bruck): log2 P messages, and a rank sends about as much as it receives even if blocks
  differ. Slices are moved only where the busiest rank would otherwise send 10% of the whole above the mean. An owner
  encodes its slices itself.
- "ssar" keeps all sums. Without rounding it equals the allgather bit for bit, since sums are made in rank order
  whoever owns them. A region that is nearly full travels without positions.

docs/collectives.md has the measured bytes.
"""

from sparsecomm.exchange.methods.split_reduce.method import SplitReduce, Ssar

__all__ = ["SplitReduce", "Ssar"]
