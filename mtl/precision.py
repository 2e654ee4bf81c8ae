"""Precision policies: in which type parameters rest, layers compute, gradients are summed over devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch


@dataclass(frozen=True)
class Precision:
    """Types for parameters and optimizer state, for compute, for gradients on the wire; whether the loss is scaled; whether layers'
    projections are multiplied in 8 bits (with one scale a side, or one a row), or float32 products rounded to TF32.
    """

    name: str
    param: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype
    scaled: bool = False
    fp8: Literal["tensor", "rows"] | None = None
    tf32: bool = False


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "fp64": Precision("fp64", torch.float64, torch.float64, torch.float64),
        "fp32": Precision("fp32", torch.float32, torch.float32, torch.float32),
        "tf32": Precision("tf32", torch.float32, torch.float32, torch.float32, tf32=True),
        "bf16": Precision("bf16", torch.float32, torch.bfloat16, torch.float32),
        "fp16": Precision("fp16", torch.float32, torch.float16, torch.float32, scaled=True),
        "fp8": Precision("fp8", torch.float32, torch.bfloat16, torch.float32, fp8="tensor"),
        "fp8_rows": Precision("fp8_rows", torch.float32, torch.bfloat16, torch.float32, fp8="rows"),
    }
)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Give the type for sums, norms, softmax and losses: float32 for 16-bit types, the type itself for wider ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32
