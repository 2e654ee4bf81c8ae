# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportIndexIssue=false
"""What copy engines leave to a GPU's multiprocessors: parts that arrived are summed, and shards are cast to where peers read them.

torch's own sum over four parts, and its copy into rows that lie apart, reach half of the memory's speed.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 2, 1024, 4
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


@triton.jit
def _add(
    x, out, rows, columns, stride, apart, members,
    SIZE: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    i, j = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    total = tl.load(x + i * stride + j, mask=here, other=0.0).to(TYPE)
    for member in tl.static_range(1, SIZE):
        total += tl.load(x + member * members + i * stride + j, mask=here, other=0.0).to(TYPE)
    tl.store(out + i * apart + j, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _add_turns(
    x, a, b, rows, columns, members, SIZE: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    row = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = (tl.program_id(0) % tiles) * COLUMNS
    both, one = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :], first + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (both < 2 * columns)
    total = tl.load(x + row * 2 * columns + both, mask=here, other=0.0).to(TYPE)
    for member in tl.static_range(1, SIZE):
        total += tl.load(x + member * members + row * 2 * columns + both, mask=here, other=0.0).to(TYPE)
    left, right = tl.split(tl.reshape(total, (ROWS, COLUMNS, 2)))
    here = (row < rows) & (one < columns)
    tl.store(a + row * columns + one, left.to(a.dtype.element_ty), mask=here)
    tl.store(b + row * columns + one, right.to(b.dtype.element_ty), mask=here)


@triton.jit
def _take_turns(a, b, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(columns, COLUMNS)
    row = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = (tl.program_id(0) % tiles) * COLUMNS
    both, one = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :], first + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (one < columns)
    left = tl.load(a + row * columns + one, mask=here, other=0.0)
    right = tl.load(b + row * columns + one, mask=here, other=0.0)
    pair = tl.reshape(tl.join(left, right), (ROWS, 2 * COLUMNS)).to(out.dtype.element_ty)
    tl.store(out + row * 2 * columns + both, pair, mask=(row < rows) & (both < 2 * columns))


def _launch(x: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """Sum [size, rows, columns] over the first dimension into rows of ``out``, in a type."""
    size, rows, columns = x.shape
    _add[triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),](
        x, out, rows, columns, x.stride(1), out.stride(0), x.stride(0),
        SIZE=size, TYPE=TYPES[dtype], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def sums(landed: Tensor, columns: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Sum [size, rows, columns] over the first dimension in a type, one after the other, cut by columns."""

    def each() -> Iterator[Tensor]:
        for part in landed.split(columns, 2):
            out = landed.new_empty(part.shape[1:], dtype=dtype)
            _launch(part, out, dtype)
            yield out

    return list(each())


def cast(x: Tensor, out: Tensor) -> None:
    """Write a matrix into rows of another type."""
    _launch((x if x.stride(1) == 1 else x.contiguous()).unsqueeze(0), out, x.dtype)


def sums_in_turn(landed: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Sum [size, rows, 2 x columns] over the first dimension in a type, and give two matrices whose columns took turns there."""
    size, rows, columns = landed.shape[0], landed.shape[1], landed.shape[2] // 2
    a, b = (landed.new_empty((rows, columns), dtype=dtype) for _ in range(2))
    _add_turns[triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),](
        landed, a, b, rows, columns, landed.stride(0), SIZE=size, TYPE=TYPES[dtype], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=2 * WARPS,
    )  # fmt: skip
    return [a, b]


def cast_in_turn(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write two matrices into one of another type, whose columns they take in turn."""
    a, b = a.contiguous(), b.contiguous()
    rows, columns = a.shape
    _take_turns[triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),](
        a, b, out, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=2 * WARPS
    )
