"""What backends have in common below `Backend.pack`, for those that want it.

    layout.py   `Packed.layout` as a line of words
    kind.py     what a weight fixes when a kernel is compiled
    joining.py  several weights that read the same x as one
    exllama.py  ExLlama's form of a weight
    rows.py     the catch-all: a form that takes any shape, in torch operators

How codes lie in a backend's own form is the backend's affair.
"""

from .kind import SCALE_KINDS, Kind
from .layout import Layout

__all__ = ["SCALE_KINDS", "Kind", "Layout"]
