"""Generation on a fused decoder: a captured step, sampling on the device, and the way in from transformers."""

from .engine import attach as attach
