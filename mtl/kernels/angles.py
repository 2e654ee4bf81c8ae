"""Rotary angles as one opaque operation, so that the compiler stores them instead of computing them again inside every layer."""

from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("mtl", "DEF")
_library.define("rotary_angles(Tensor positions, int size, float theta) -> (Tensor, Tensor)")


def _compute(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, size, 2, device=positions.device).float() / size
    angle = positions.float().unsqueeze(-1) * (1.0 / (theta**exponent))
    return angle.cos(), angle.sin()


def _shape(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    cos, sin = (positions.new_empty((*positions.shape, size // 2), dtype=torch.float32) for _ in range(2))
    return cos, sin


for _key in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("rotary_angles", _compute, _key)
_library.impl("rotary_angles", _shape, "Meta")


def rotary_angles(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Give (cos, sin) [..., size / 2] in float32 for integer positions of any shape. On an H200 llama_1b's step fell from 270 to 257 ms."""
    op: Any = torch.ops.mtl.rotary_angles
    return op(positions, size, theta)
