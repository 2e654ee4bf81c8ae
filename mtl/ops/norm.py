"""Norms: computed in at least float32, returned in the input's type."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square and scale it."""
    y = x.to(wide(x.dtype))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(y.dtype)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Bring the last dimension to mean 0 and variance 1, scale and shift it."""
    dtype = wide(x.dtype)
    shift = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), shift, eps).to(x.dtype)
