"""Matrix products in 8 bits: both sides are scaled to the format's range by their largest values, which are found anew each time.

One scale serves a whole side ("tensor"), or each row of the left and each column of the right has its own ("rows"). With one, values and
weights travel in e4m3 (3 bits of fraction) and gradients in e5m2 (more range); with many, all in e4m3. Sums are taken in float32.

The units that multiply read both sides along the summed dimension, so backward needs what it rounds turned over too. No compiler sees
inside the rounding: left to inductor, a matrix with several readers was held in float32, four times what it takes in 8 bits.

Weights that rest in parts and whose scale is known are rounded part by part (`side_by_side`), travel in 8 bits, and are turned over as
bytes (`turned`): the same numbers as those of the whole weight.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mtl.kernels import nvidia

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What every size must divide by."""
Scales = Literal["tensor", "rows"]

_library: Any = torch.library.Library("mtl_fp8", "DEF")
_library.define("rounded(Tensor x, Tensor? across, Tensor? down, ScalarType dtype) -> (Tensor, Tensor)", tags=(torch.Tag.flexible_layout,))
_library.define("side_by_side(Tensor[] parts, Tensor scale, ScalarType through) -> Tensor")
_library.define("turned(Tensor x) -> Tensor")


class Rounded(NamedTuple):
    """A matrix in 8 bits, and what it was scaled by: one factor, or one for each row (M, 1)."""

    values: Tensor
    scale: Tensor


class Side(NamedTuple):
    """A matrix in 8 bits as it is, and turned over. A way that nobody asked for is empty."""

    plain: Rounded
    turned: Rounded


def scale_for(x: Tensor, dtype: torch.dtype = VALUES, dim: int | None = None) -> Tensor:
    """Give the factors, in float32, that take the largest absolute values to the format's largest: one, or one for all along ``dim``."""
    # The largest of each row first: this much fuses with what makes the matrix.
    return scale_of(x.abs().amax(-1).amax() if dim is None else x.abs().amax(dim, keepdim=True), dtype)


def scale_of(largest: Tensor, dtype: torch.dtype = VALUES) -> Tensor:
    """Give the factors that take these largest absolute values to the format's largest."""
    return torch.finfo(dtype).max / largest.float().clamp(min=1e-30)


def side(
    x: Tensor, scales: Scales = "tensor", known: Tensor | None = None, plain: bool = True, turned: bool = True, dtype: torch.dtype = VALUES
) -> Side:
    """Scale a matrix and round it in the ways that are asked for. The one scale of a whole side may be known already."""
    if scales == "tensor":
        known = scale_for(x, dtype) if known is None else known
        across = down = known
    else:
        dtype = VALUES
        across, down = (scale_for(x, dtype, dim) if wanted else None for dim, wanted in ((1, plain), (0, turned)))
    first, second = rounded(x, across if plain else None, down if turned else None, dtype)
    none = first.new_empty(0, dtype=torch.float32)
    return Side(Rounded(first, none if across is None else across), Rounded(second, none if down is None else down.t()))


def rounded(x: Tensor, across: Tensor | None, down: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a matrix (M, N) to 8 bits: as it is, scaled by ``across``, and turned over (N, M), scaled by ``down``.

    A scale is one factor, or ``across`` is (M, 1) and ``down`` is (1, N). Where there is none, that way is empty.
    """
    op: Any = torch.ops.mtl_fp8.rounded
    return op(x, across, down, dtype)


def side_by_side(parts: Sequence[Tensor], scale: Tensor, through: torch.dtype) -> Tensor:
    """Round matrices (M, N), brought to the type ``through`` first, to 8 bits by one scale, next to each other: (M, all N)."""
    op: Any = torch.ops.mtl_fp8.side_by_side
    return op(list(parts), scale, through)


def turned(x: Tensor) -> Tensor:
    """Turn a matrix in 8 bits over: (M, N) to (N, M) in memory."""
    op: Any = torch.ops.mtl_fp8.turned
    return op(x)


def lay(x: Tensor, scale: Tensor, through: torch.dtype, out: Tensor, also: Tensor | None = None) -> None:
    """Round one matrix into ``out``, and a second place, whose rows may lie apart; see `side_by_side`."""
    kernel = nvidia.module("fp8_triton") if x.device.type == "cuda" else None
    if kernel is not None:
        kernel.lay(x, scale, through, out, also)
        return
    for target in (out,) if also is None else (out, also):
        target.copy_(plain(x.to(through), scale, None, VALUES)[0])


def multiply(a: Rounded, b: Rounded, dtype: torch.dtype, fast: bool | None = None) -> Tensor:
    """Give a @ b.T in a type, for a (M, K) and b (N, K).

    A ``fast`` sum keeps fewer bits between its parts; left open, gradients in e5m2 take the slower, more exact one.
    """
    scale_b = b.scale.t()
    if a.values.device.type == "cpu":
        return ((a.values.float() @ b.values.t().float()) / (a.scale * scale_b)).to(dtype)
    fast = a.values.dtype == b.values.dtype if fast is None else fast
    scales = a.scale.reciprocal(), scale_b.reciprocal()
    return torch._scaled_mm(a.values, b.values.t(), *scales, out_dtype=dtype, use_fast_accum=fast)  # pyright: ignore


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
    kernel = nvidia.module("fp8_triton")
    return (plain if kernel is None else kernel.rounded)(x, across, down, dtype)


def _side_by_side(parts: list[Tensor], scale: Tensor, through: torch.dtype) -> Tensor:
    out, at = _side_shape(parts, scale, through), 0
    for x in parts:
        lay(x, scale, through, out[:, at : at + x.shape[1]])
        at += x.shape[1]
    return out


def _turn(x: Tensor) -> Tensor:
    kernel = nvidia.module("fp8_triton") if x.device.type == "cuda" else None
    return x.view(torch.uint8).t().contiguous().view(x.dtype) if kernel is None else kernel.turned(x)


def _side_shape(parts: list[Tensor], scale: Tensor, through: torch.dtype) -> Tensor:
    return torch.empty((parts[0].shape[0], sum(x.shape[1] for x in parts)), dtype=VALUES, device=scale.device)


def _turned_shape(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0]))


def _shape(x: Tensor, across: Tensor | None, down: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    shapes = (0 if across is None else (rows, columns), 0 if down is None else (columns, rows))
    first, second = (torch.empty(shape, dtype=dtype, device=x.device) for shape in shapes)
    return first, second


for _key in ("CUDA", "CPU", "XPU", "MPS"):
    _library.impl("rounded", _launch if _key == "CUDA" else plain, _key)
    _library.impl("side_by_side", _side_by_side, _key)
    _library.impl("turned", _turn, _key)
for _name, _fake in (("rounded", _shape), ("side_by_side", _side_shape), ("turned", _turned_shape)):
    torch.library.register_fake(f"mtl_fp8::{_name}", _fake, lib=_library)
