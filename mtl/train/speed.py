"""How fast a run is: floating-point operations a token, and what share of the device's peak that reaches."""

import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mtl import tree
from mtl.kernels import copy_engine

PEAKS: Mapping[str, float] = MappingProxyType(
    {
        "H200": 989e12,
        "H100": 989e12,
        "H800": 989e12,
        "GH200": 989e12,
        "B200": 2250e12,
        "A100": 312e12,
        "A800": 312e12,
        "L40S": 362e12,
        "L4": 121e12,
    }
)
"""Dense bf16 peaks from the vendors' data sheets."""


def flops_per_token(specs: Any, config: Any, seq_len: int, causal: bool = True, adapters: Any = None) -> float:
    """Count a training step's operations a token: 6 N plus attention's square, halved where causal.

    N is every parameter but the input embedding and learned positions; a tied head counts, since its product is computed. A sliding
    window is not taken off. Where ``adapters`` (their specs) are trained alone, the model itself takes 4 N: it has no gradients of weights.
    """
    total = sum(math.prod(s.shape) for s in tree.leaves(specs))
    idle = math.prod(specs["embed"]["weight"].shape) * (0 if "head" not in specs else 1)
    idle += math.prod(specs["positions"]["weight"].shape) if "positions" in specs else 0
    square = 12.0 * config.layers * config.heads * config.head_size * seq_len
    thin = 0 if adapters is None else sum(math.prod(s.shape) for s in tree.leaves(adapters))
    return (6.0 if adapters is None else 4.0) * (total - idle) + 6.0 * thin + (square / 2 if causal else square)


def peak_flops(device: torch.device) -> float | None:
    """Give the device's dense bf16 peak, or None where it is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAKS.items() if name in words), None)


def peak_memory_gib(device: torch.device) -> float:
    """Give the most memory that was in use: of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + copy_engine.held()) / 2**30
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reserved_memory_gib(device: torch.device) -> float:
    """Give the most memory that torch's allocator held, gaps between tensors included; where there is none, what was in use."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_reserved(device) + copy_engine.held()) / 2**30
    return peak_memory_gib(device)


def resident_gib() -> float:
    """Give the memory that this process holds now, where the system says it (Linux); else 0."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 2**30
