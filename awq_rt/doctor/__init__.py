"""What this machine has, what of it awq_rt can use, and what to do about the rest.

    facts       what was read here, and what workers answered
      engine    worker: imports torch, transformers and the plugins; who serves what
      kernels   worker: runs kernels beside the reference
      model     worker: looks at a checkpoint
    checks      what is looked at, in order
      rules     from facts to findings
    verdict     the sentence that comes first
    diagnosis   the report (report.py; schema.json is its JSON)
    bundle      the report and what goes with it in one file; redaction
    __main__    the report as JSON, where not even the command line's own libraries are whole

Torch, transformers and the plugins are only ever imported in a process of its own: whatever is broken, even an
`import torch` that takes its process down, the doctor lives to say so. Nothing in this process needs more than the
standard library.
"""

from .checks import CHECKS
from .diagnosis import diagnose
from .facts import Request
from .report import BUG, SCHEMA, Finding, Report, Status, Torch, Verdict

__all__ = ["BUG", "CHECKS", "SCHEMA", "Finding", "Report", "Request", "Status", "Torch", "Verdict", "diagnose"]
