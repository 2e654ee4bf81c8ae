"""Modules of Triton kernels, which NVIDIA GPUs alone run here."""

import functools
import importlib
import importlib.util
from typing import Any

import torch


@functools.cache
def module(name: str) -> Any:
    """Give a module of kernels beside this one; None where there is no Triton for NVIDIA GPUs."""
    there = torch.version.hip is None and importlib.util.find_spec("triton") is not None
    return importlib.import_module(f"mtl.kernels.{name}") if there else None
