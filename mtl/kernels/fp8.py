"""Matrix products in 8 bits: both sides are scaled to the format's range by their largest value, which is found anew each time.

Values and weights travel in e4m3 (3 bits of fraction), gradients in e5m2 (more range). Sums are taken in float32.
"""

import torch
from torch import Tensor

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What every size must divide by."""


def scale_for(x: Tensor, dtype: torch.dtype = VALUES) -> Tensor:
    """Give the factor that takes the largest absolute value to the format's largest, a float32 scalar."""
    return torch.finfo(dtype).max / x.abs().amax().float().clamp(min=1e-30)


def fits(*sizes: int) -> bool:
    """Tell whether a product of these sizes can be taken in 8 bits."""
    return all(size % MULTIPLE == 0 for size in sizes)


def matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, type_a: torch.dtype = VALUES, type_b: torch.dtype = VALUES) -> Tensor:
    """Give a @ b for a (M, K) and b (K, N) in a's type, both rounded to 8 bits after they were scaled."""
    a8 = _rounded(a, scale_a, type_a).contiguous()
    b8 = _rounded(b, scale_b, type_b).t().contiguous().t()  # the multiprocessors read it column by column
    if a.device.type == "cpu":
        return ((a8.float() @ b8.float()) / (scale_a * scale_b)).to(a.dtype)
    fast = type_a == type_b  # gradients take the slower, more exact sum
    return torch._scaled_mm(a8, b8, scale_a.reciprocal(), scale_b.reciprocal(), out_dtype=a.dtype, use_fast_accum=fast)  # pyright: ignore


def _rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype)
