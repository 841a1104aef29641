"""From a checkpoint to a transformers model whose packed linears run on a backend.

placement    which checkpoint tensors belong to which module, by transformers' own naming rules
experts      a mixture's experts, kept in 4 bits
dense        the other tensors, read when transformers asks for them
activation   activations that AWQ divides by a scale
architecture which class config.json describes; the only place where a checkpoint's code may run
quantizer    the hook in transformers' loader that puts these modules in place and fills them
loading      `awq_rt.load`
"""

from .loading import load

__all__ = ["load"]
