"""What a backend's author tests it with: the derived tolerance, shapes and weights that hurt, the conformance suite."""

from .cases import HURTFUL_SHAPES, Case, hurtful_cases, hurtful_weight
from .tolerance import UNIT_ROUNDOFF, bound, excess, reference

__all__ = ["HURTFUL_SHAPES", "UNIT_ROUNDOFF", "Case", "bound", "excess", "hurtful_cases", "hurtful_weight", "reference"]
