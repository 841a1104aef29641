"""A GPU as the host half sees it: its architecture, its size, and the compiler for it."""

from __future__ import annotations

import functools

import torch

from awq_rt.errors import UnsupportedDevice
from awq_rt.rtc import Builder

from . import targets
from .hiprtc import Hiprtc


@functools.cache
def builder() -> Builder:
    """hipRTC with the cache in front of it."""
    return Builder(Hiprtc())


@functools.cache
def architecture_of(device_index: int) -> targets.Architecture:
    """Raises `UnsupportedDevice` for a GPU that the kernels do not run on."""
    properties = torch.cuda.get_device_properties(device_index)
    found = targets.architecture(properties.gcnArchName)
    if found is None or properties.warp_size != found.wave_size:
        raise UnsupportedDevice(
            f"cuda:{device_index} is {properties.gcnArchName} with waves of {properties.warp_size} lanes, which the "
            f"kernels are not written for; use backend='reference' [{targets.OVERRIDE} may be set]"
        )
    return found


@functools.cache
def compute_units(device_index: int) -> int:
    """As torch counts them: on RDNA these are workgroup processors of two each."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def index_of(device: torch.device) -> int:
    """Its index, the current one's where it has none."""
    return torch.cuda.current_device() if device.index is None else device.index
