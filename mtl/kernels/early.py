"""Kernels that start while the one before them ends (programmatic dependent launch): from Hopper on.

A kernel of a token runs some 10 us, and to start after the last program of another has ended takes one or two. Such a kernel lets the
next one start at once, and waits for the end of the one before it before it reads or writes anything that kernels write.
"""

import functools
from typing import Any

import torch


@functools.cache
def early(device: torch.device) -> dict[str, Any]:
    """Give a Triton kernel's arguments: EARLY, and the launch that goes with it."""
    can = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}
