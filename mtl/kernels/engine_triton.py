# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportIndexIssue=false
"""What copy engines leave to a GPU's multiprocessors: parts that arrived are summed, and shards are cast to where peers read them and to
where this device does.

torch's own sum over four parts, and its copy into rows that lie apart, reach half of the memory's speed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 2, 1024, 4
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


@triton.jit
def _tile(first, second, third, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Give a program's rows, and which of three matrices side by side it has, and their place there: tiles do not reach over two."""
    ends_first = tl.cdiv(first, COLUMNS)
    ends_second = ends_first + tl.cdiv(second, COLUMNS)
    tiles = ends_second + tl.cdiv(third, COLUMNS)
    tile = tl.program_id(0) % tiles
    which = (tile >= ends_first).to(tl.int32) + (tile >= ends_second).to(tl.int32)
    tile -= tl.where(which == 2, ends_second, tl.where(which == 1, ends_first, 0))
    rows = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    return rows.to(tl.int64)[:, None], (tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :], which


@triton.jit
def _add(
    x, own, a, b, c, rows, first, second, third, stride, along, members,
    ME: tl.constexpr, SIZE: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i, j, which = _tile(first, second, third, ROWS, COLUMNS)
    out, columns, skipped = a, first, 0
    if which == 1:
        out, columns, skipped = b, second, first
    elif which == 2:
        out, columns, skipped = c, third, first + second
    here = (i < rows) & (j < columns)
    total = tl.load(own + i * along + skipped + j if ME == 0 else x + i * stride + skipped + j, mask=here, other=0.0).to(TYPE)
    for member in tl.static_range(1, SIZE):
        place = own + i * along + skipped + j if member == ME else x + member * members + i * stride + skipped + j
        total += tl.load(place, mask=here, other=0.0).to(TYPE)
    tl.store(out + i * columns + j, total, mask=here)


@triton.jit
def _cast(
    a, b, c, out, also, rows, first, second, third, stride_a, stride_b, stride_c, apart, further,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i, j, which = _tile(first, second, third, ROWS, COLUMNS)
    x, columns, stride, skipped = a, first, stride_a, 0
    if which == 1:
        x, columns, stride, skipped = b, second, stride_b, first
    elif which == 2:
        x, columns, stride, skipped = c, third, stride_c, first + second
    here = (i < rows) & (j < columns)
    values = tl.load(x + i * stride + j, mask=here, other=0.0).to(out.dtype.element_ty)
    tl.store(out + i * apart + skipped + j, values, mask=here)
    tl.store(also + i * further + skipped + j, values, mask=here)


@triton.jit
def _add_turns(
    x, own, a, b, rows, columns, along, members,
    ME: tl.constexpr, SIZE: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    row = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = (tl.program_id(0) % tiles) * COLUMNS
    both, one = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :], first + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (both < 2 * columns)
    total = tl.load(own + row * along + both if ME == 0 else x + row * 2 * columns + both, mask=here, other=0.0).to(TYPE)
    for member in tl.static_range(1, SIZE):
        place = own + row * along + both if member == ME else x + member * members + row * 2 * columns + both
        total += tl.load(place, mask=here, other=0.0).to(TYPE)
    left, right = tl.split(tl.reshape(total, (ROWS, COLUMNS, 2)))
    here = (row < rows) & (one < columns)
    tl.store(a + row * columns + one, left.to(a.dtype.element_ty), mask=here)
    tl.store(b + row * columns + one, right.to(b.dtype.element_ty), mask=here)


@triton.jit
def _take_turns(a, b, out, also, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(columns, COLUMNS)
    row = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = (tl.program_id(0) % tiles) * COLUMNS
    both, one = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :], first + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (one < columns)
    left = tl.load(a + row * columns + one, mask=here, other=0.0)
    right = tl.load(b + row * columns + one, mask=here, other=0.0)
    pair = tl.reshape(tl.join(left, right), (ROWS, 2 * COLUMNS)).to(out.dtype.element_ty)
    here = (row < rows) & (both < 2 * columns)
    tl.store(out + row * 2 * columns + both, pair, mask=here)
    tl.store(also + row * 2 * columns + both, pair, mask=here)


AT_ONCE = 3
"""How many matrices side by side one launch takes: a query's, key's and value's weights."""


def _tiles(rows: int, *columns: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS) * sum(triton.cdiv(width, COLUMNS) for width in columns),)


def _filled(some: Sequence[Tensor], columns: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Fill up to as many matrices as a launch takes, with such as have no columns."""
    none = AT_ONCE - len(some)
    return [*some, *[some[0]] * none], [*columns, *[0] * none]


def sums(landed: Tensor, own: Tensor, me: int, columns: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Sum [size, rows, columns] over the first dimension in a type, one after the other, cut by columns; ``own`` is what ``me`` holds."""
    own = own if own.stride(1) == 1 else own.contiguous()
    size, rows = landed.shape[:2]
    found = [landed.new_empty((rows, width), dtype=dtype) for width in columns]
    at = 0
    for i in range(0, len(found), AT_ONCE):
        outs, widths = _filled(found[i : i + AT_ONCE], columns[i : i + AT_ONCE])
        x, mine = landed[:, :, at:], own[:, at:]
        _add[_tiles(rows, *widths)](
            x, mine, *outs, rows, *widths, x.stride(1), mine.stride(0), x.stride(0),
            ME=me, SIZE=size, TYPE=TYPES[dtype], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        at += sum(widths)
    return found


def cast(parts: Sequence[Tensor], out: Tensor, also: Tensor) -> None:
    """Write matrices, side by side, into rows of another type, and into those of a second place."""
    parts, at = [x if x.stride(1) == 1 else x.contiguous() for x in parts], 0
    for i in range(0, len(parts), AT_ONCE):
        some, widths = _filled(parts[i : i + AT_ONCE], [x.shape[1] for x in parts[i : i + AT_ONCE]])
        there, here, rows = out[:, at:], also[:, at:], some[0].shape[0]
        _cast[_tiles(rows, *widths)](
            *some, there, here, rows, *widths, *(x.stride(0) for x in some), there.stride(0), here.stride(0),
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        at += sum(widths)


def sums_in_turn(landed: Tensor, own: Tensor, me: int, dtype: torch.dtype) -> list[Tensor]:
    """Do as `sums` with [size, rows, 2 x columns], and give two matrices whose columns took turns there."""
    own = own if own.stride(1) == 1 else own.contiguous()
    size, rows, columns = landed.shape[0], landed.shape[1], landed.shape[2] // 2
    a, b = (landed.new_empty((rows, columns), dtype=dtype) for _ in range(2))
    _add_turns[_tiles(rows, columns)](
        landed, own, a, b, rows, columns, own.stride(0), landed.stride(0),
        ME=me, SIZE=size, TYPE=TYPES[dtype], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=2 * WARPS,
    )  # fmt: skip
    return [a, b]


def cast_in_turn(a: Tensor, b: Tensor, out: Tensor, also: Tensor) -> None:
    """Write two matrices into one of another type, whose columns they take in turn, and into a second such one."""
    a, b = a.contiguous(), b.contiguous()
    _take_turns[_tiles(*a.shape)](a, b, out, also, *a.shape, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=2 * WARPS)
