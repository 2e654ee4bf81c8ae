"""Matrix products in 8 bits: both sides are scaled to the format's range by their largest value, which is found anew each time.

Values and weights travel in e4m3 (3 bits of fraction), gradients in e5m2 (more range). Sums are taken in float32.
The units that multiply read both sides along the summed dimension, so backward needs what it rounds turned over too. No compiler sees
inside the rounding: left to inductor, a matrix with several readers was held in float32, four times what it takes in 8 bits.
"""

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What every size must divide by."""

_library: Any = torch.library.Library("mtl_fp8", "DEF")
_library.define("rounded(Tensor x, Tensor? across, Tensor? down, ScalarType dtype) -> (Tensor, Tensor)", tags=(torch.Tag.flexible_layout,))


class Side(NamedTuple):
    """A matrix in 8 bits, as it is and turned over, and what it was scaled by. A way that nobody asked for is empty."""

    plain: Tensor
    turned: Tensor
    scale: Tensor


def scale_for(x: Tensor, dtype: torch.dtype = VALUES) -> Tensor:
    """Give the factor that takes a matrix's largest absolute value to the format's largest, a float32 scalar."""
    rows = x.abs().amax(-1)  # first of each row: this much fuses with what makes the matrix
    return torch.finfo(dtype).max / rows.amax().float().clamp(min=1e-30)


def side(x: Tensor, scale: Tensor | None = None, plain: bool = True, turned: bool = True, dtype: torch.dtype = VALUES) -> Side:
    """Scale a matrix, by what is known or found, and round it in the ways that are asked for."""
    scale = scale_for(x, dtype) if scale is None else scale
    return Side(*rounded(x, scale if plain else None, scale if turned else None, dtype), scale)


def rounded(x: Tensor, across: Tensor | None, down: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a matrix (M, N) to 8 bits: as it is, scaled by ``across``, and turned over (N, M), scaled by ``down``.

    A scale is one factor, or ``across`` is (M, 1) and ``down`` is (1, N). Where there is none, that way is empty.
    """
    op: Any = torch.ops.mtl_fp8.rounded
    return op(x, across, down, dtype)


def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool | None = None) -> Tensor:
    """Give a @ b.T in a type, for a (M, K) and b (N, K) in 8 bits that were scaled before.

    A ``fast`` sum keeps fewer bits between its parts; left open, gradients take the slower, more exact one.
    """
    if a.device.type == "cpu":
        return ((a.float() @ b.t().float()) / (scale_a * scale_b)).to(dtype)
    fast = a.dtype == b.dtype if fast is None else fast
    return torch._scaled_mm(a, b.t(), scale_a.reciprocal(), scale_b.reciprocal(), out_dtype=dtype, use_fast_accum=fast)  # pyright: ignore


def fits(*sizes: int) -> bool:
    """Tell whether a product of these sizes can be taken in 8 bits."""
    return all(size % MULTIPLE == 0 for size in sizes)


def plain(x: Tensor, across: Tensor | None, down: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Do what the kernel does, in separate operations; see `rounded`."""
    most = torch.finfo(dtype).max
    ways = [None if scale is None else (x.float() * scale).clamp(-most, most).to(dtype) for scale in (across, down)]
    none = torch.empty(0, dtype=dtype, device=x.device)
    return none if ways[0] is None else ways[0].contiguous(), none.clone() if ways[1] is None else ways[1].t().contiguous()


def _launch(x: Tensor, across: Tensor | None, down: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kernel = _kernel()
    return (plain if kernel is None else kernel.rounded)(x, across, down, dtype)


def _shape(x: Tensor, across: Tensor | None, down: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    shapes = (0 if across is None else (rows, columns), 0 if down is None else (columns, rows))
    first, second = (torch.empty(shape, dtype=dtype, device=x.device) for shape in shapes)
    return first, second


@functools.cache
def _kernel() -> Any:
    """Give the module of the kernel, where there is Triton for NVIDIA GPUs."""
    there = torch.version.hip is None and importlib.util.find_spec("triton") is not None
    return importlib.import_module("mtl.kernels.fp8_triton") if there else None


_library.impl("rounded", _launch, "CUDA")
for _key in ("CPU", "XPU", "MPS"):
    _library.impl("rounded", plain, _key)
torch.library.register_fake("mtl_fp8::rounded", _shape, lib=_library)
