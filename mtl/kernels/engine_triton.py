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
