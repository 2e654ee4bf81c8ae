# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
"""The kernel of `mtl.kernels.few_rows`, in Triton: imported where there is a GPU to run it."""

import triton
import triton.language as tl


@triton.jit
def multiply(
    x, w, scale, more, out, x_row, w_row, more_row, out_row, rows, columns, eps,
    ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Make COLUMNS columns of ROWS rows: each contracts x with a row of memory, read in blocks, of which the next is always under way."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :, None]
    m, k = tl.arange(0, ROWS)[:, None, None], tl.arange(0, BLOCK)[None, None, :]
    here = w + n.to(tl.int64) * w_row + k
    beside = here + columns.to(tl.int64) * w_row
    inside = n < columns
    known = inside & (k < INNER)
    block = tl.load(here, mask=None if EVEN else known, other=None if EVEN else 0.0, eviction_policy="evict_first")
    if GATED:
        block2 = tl.load(beside, mask=None if EVEN else known, other=None if EVEN else 0.0, eviction_policy="evict_first")
    row = tl.arange(0, ROWS)[:, None]
    own = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if ADD:
        added = tl.load(more + row * more_row + own, mask=(row < rows) & (own < columns), other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS, BLOCK], tl.float32)
    if GATED:
        total2 = tl.zeros([ROWS, COLUMNS, BLOCK], tl.float32)
    if NORM:
        squares = tl.zeros([ROWS, 1, BLOCK], tl.float32)
    for start in tl.static_range(0, INNER, BLOCK):
        used = (m < rows) & (k < INNER - start)
        factor = tl.load(x + m * x_row + start + k, mask=used, other=0.0).to(tl.float32)
        if NORM:
            squares += factor * factor
            factor *= tl.load(scale + start + k, mask=k < INNER - start, other=0.0).to(tl.float32)
        now = block
        if GATED:
            now2 = block2
        if start + BLOCK < INNER:
            known = inside & (k < INNER - start - BLOCK)
            block = tl.load(here + start + BLOCK, mask=None if EVEN else known, other=None if EVEN else 0.0, eviction_policy="evict_first")
            if GATED:
                block2 = tl.load(
                    beside + start + BLOCK, mask=None if EVEN else known, other=None if EVEN else 0.0, eviction_policy="evict_first"
                )
        total += now.to(tl.float32) * factor
        if GATED:
            total2 += now2.to(tl.float32) * factor
    result = tl.sum(total, 2)
    if NORM:
        norm = tl.rsqrt(tl.sum(squares, 2) / INNER + eps)
        result *= norm
    if GATED:
        second = tl.sum(total2, 2)
        if NORM:
            second *= norm
        result = result / (1 + tl.exp(-result)) * second
    if ADD:
        result += added
    tl.store(out + row * out_row + own, result.to(out.dtype.element_ty), mask=(row < rows) & (own < columns))
