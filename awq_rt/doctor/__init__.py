"""What this machine has, what of it awq_rt can use, and what to do about the rest.

Torch, transformers and the plugins are only ever imported in a process of its own (`engine.py`): whatever is broken,
even an `import torch` that takes its process down, the doctor lives to say so. Nothing in this process needs more than
the standard library.
"""

from .diagnosis import diagnose
from .report import SCHEMA, Finding, Report, Torch, Verdict

__all__ = ["SCHEMA", "Finding", "Report", "Torch", "Verdict", "diagnose"]
