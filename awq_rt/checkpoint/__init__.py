"""Reading a checkpoint, wherever it lies and however it is packed, and writing one.

files      the folder, local or from the hub, and which of its files hold tensors
storage    tensors in safetensors or pickles, opened lazily and checked before anything is allocated
config     what the configuration says of the quantisation, in every spelling
reader     `Checkpoint`: a mapping from a linear's name to its canonical weight
writer     a folder of shards that appears whole or not at all
"""

from .reader import Checkpoint, StoredLinear, open_checkpoint
from .writer import write_checkpoint

__all__ = ["Checkpoint", "StoredLinear", "open_checkpoint", "write_checkpoint"]
