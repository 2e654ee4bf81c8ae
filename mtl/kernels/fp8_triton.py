# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportIndexIssue=false
"""Rounding to 8 bits on a GPU: each tile is read once, and written as it lies, turned over, or both ways."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 128, 128, 8
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _round(
    x, plain, turned, also, across, down, rows, columns, stride, apart, further, most,
    PLAIN: tl.constexpr, TURNED: tl.constexpr, ALSO: tl.constexpr, EACH: tl.constexpr, THROUGH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    i, j = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    values = tl.load(x + i * stride + j, mask=here, other=0.0).to(THROUGH).to(tl.float32)
    if PLAIN:
        scale = tl.load(across + row, mask=row < rows, other=1.0)[:, None] if EACH else tl.load(across)
        scaled = tl.clamp(values * scale, -most, most, propagate_nan=tl.PropagateNan.ALL)
        tl.store(plain + i * apart + j, scaled.to(plain.dtype.element_ty), mask=here)
        if ALSO:
            tl.store(also + i * further + j, scaled.to(plain.dtype.element_ty), mask=here)
    if TURNED:
        scale = tl.load(down + column, mask=column < columns, other=1.0)[None, :] if EACH else tl.load(down)
        scaled = tl.clamp(values * scale, -most, most, propagate_nan=tl.PropagateNan.ALL)
        tl.store(turned + j * rows + i, scaled.to(turned.dtype.element_ty), mask=here)


def rounded(x: Tensor, across: Tensor | None, down: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a matrix both ways, or one; see `mtl.kernels.fp8.rounded`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    plain = torch.empty(0 if across is None else (rows, columns), dtype=dtype, device=x.device)
    turned = torch.empty(0 if down is None else (columns, rows), dtype=dtype, device=x.device)
    across, down = (None if scale is None else scale.contiguous() for scale in (across, down))
    each = any(scale is not None and scale.dim() > 0 for scale in (across, down))
    _round[triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),](
        x, plain, turned, plain, across, down, rows, columns, x.stride(0), columns, columns, torch.finfo(dtype).max,
        PLAIN=across is not None, TURNED=down is not None, ALSO=False, EACH=each, THROUGH=tl.float32,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return plain, turned


def lay(x: Tensor, scale: Tensor, through: torch.dtype, out: Tensor, also: Tensor | None = None) -> None:
    """Round a matrix, brought to a type first, into ``out`` and a second place; see `mtl.kernels.fp8.lay`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, columns), second = x.shape, out if also is None else also
    _round[triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),](
        x, out, out, second, scale, scale, rows, columns, x.stride(0), out.stride(0), second.stride(0), torch.finfo(out.dtype).max,
        PLAIN=True, TURNED=False, ALSO=also is not None, EACH=False, THROUGH=TYPES[through], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _turn(x, out, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    i, j = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    tl.store(out + j * rows + i, tl.load(x + i * stride + j, mask=here, other=0), mask=here)


def turned(x: Tensor) -> Tensor:
    """Turn a matrix of single bytes over; see `mtl.kernels.fp8.turned`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    out = x.new_empty((columns, rows))
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    _turn[tiles,](x.view(torch.uint8), out.view(torch.uint8), rows, columns, x.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)
    return out
