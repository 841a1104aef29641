"""From a dense checkpoint to a 4-bit AWQ one.

settings      everything that decides a result
source        the dense checkpoint's tensors, one at a time
calibration   the text on which activations are observed
streaming     a transformers model of which one block at a time has weights
experts       a mixture's experts as linears
groups        which scales a block has room for, found by trying
moments       E[x x^T] of the linears' inputs
grid          the 4-bit grid of a group
scaling       the search for scales
ranges        the search for ranges: clipping
feedback      rounding with error feedback
block         these together, for one block
tuning        scales and norms of all blocks, by the whole model's predictions
packing       a block's tensors under the checkpoint's names, and back
store         finished blocks on disk, so that a run can be taken up again
report        what was done
run           `awq_rt.quantize`
"""

from .run import quantize

__all__ = ["quantize"]
