"""The model of the same shape in float16, run by transformers as it is: what 4 bits are compared with."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..models.architecture import architecture


@torch.no_grad()
def dense_model(checkpoint: Checkpoint, device: torch.device, trust_remote_code: bool = False) -> Any:
    """A transformers model of the checkpoint's configuration, in float16, as transformers initialises it at random."""
    config, model_class = architecture(checkpoint, trust_remote_code)
    with device:
        return model_class._from_config(config, dtype=torch.float16).eval()
