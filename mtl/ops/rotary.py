"""Rotary position embedding from explicit positions, with angles in float32."""

import torch
from torch import Tensor

from mtl.kernels.angles import rotary_angles
from mtl.precision import wide


def angles(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Give (cos, sin) of shape [..., head_size / 2] in float32 for positions of any shape."""
    return rotary_angles(positions, head_size, theta)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str = "half") -> Tensor:
    """Turn the pairs of every head: x is [B, S, heads, K], cos and sin [B, S, K / 2].

    ``pairs`` is "half" (element i pairs with i + K / 2) or "interleaved" (2 i with 2 i + 1).
    """
    dtype = wide(x.dtype)
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    wider = x.to(dtype)
    a, b = wider.chunk(2, -1) if pairs == "half" else wider.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.cat(turned, -1) if pairs == "half" else torch.stack(turned, -1).flatten(-2)
    return out.to(x.dtype)
