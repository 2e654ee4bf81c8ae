# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportIndexIssue=false
"""Heads turned to their positions on a GPU: every number of query, key and value is read once and written once, either way."""

import math

import triton
import triton.language as tl
from torch import Tensor

TOKENS, HEADS, WARPS = 4, 8, 4


@triton.jit
def _move(
    y, q, k, v, cos, sin, tokens, stride_y, stride_q, stride_k, stride_v, head_q, head_k, head_v,
    BACK: tl.constexpr, HALVES: tl.constexpr, COUNT: tl.constexpr, BOTH: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    pair = tl.arange(0, WIDE)[None, None, :]
    here = (token < tokens) & (pair < HALF)
    c = tl.load(cos + token * HALF + pair, mask=here, other=0.0)
    s = tl.load(sin + token * HALF + pair, mask=here, other=0.0)
    if BACK:
        s = -s
    first, second = (pair, pair + HALF) if HALVES else (2 * pair, 2 * pair + 1)
    for start in range(0, 2 * BOTH - COUNT, GROUP):
        part, skipped, stride, step = q, 0, stride_q, head_q
        if start >= BOTH:
            part, skipped, stride, step = v, BOTH, stride_v, head_v
        elif start >= COUNT:
            part, skipped, stride, step = k, COUNT, stride_k, head_k
        head = (start + tl.arange(0, GROUP)).to(tl.int64)[None, :, None]
        whole = y + token * stride_y + head * (2 * HALF)
        own = part + token * stride + (head - skipped) * step
        source, target = (own, whole) if BACK else (whole, own)
        a = tl.load(source + first, mask=here, other=0.0)
        b = tl.load(source + second, mask=here, other=0.0)
        if start < BOTH:
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a = (wide_a * c - wide_b * s).to(a.dtype)
            b = (wide_b * c + wide_a * s).to(b.dtype)
        tl.store(target + first, a, mask=here)
        tl.store(target + second, b, mask=here)


def move(y: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pairs: str, back: bool) -> None:
    """Fill query, key and value [..., heads, K] from y [..., columns of all three], or with ``back`` y from these; angles are by token."""
    half = cos.shape[-1]
    rows = [x.flatten(0, -3) if x.stride(-1) == 1 or not back else x.flatten(0, -3).contiguous() for x in (q, k, v)]
    heads, kv = rows[0].shape[1], rows[1].shape[1]
    group = math.gcd(heads, kv, HEADS)
    flat = y.view(-1, y.shape[-1])
    _move[(triton.cdiv(flat.shape[0], TOKENS),)](
        flat, *rows, cos, sin, flat.shape[0], flat.stride(0), *(x.stride(0) for x in rows), *(x.stride(1) for x in rows),
        BACK=back, HALVES=pairs == "half", COUNT=heads, BOTH=heads + kv, HALF=half, WIDE=triton.next_power_of_2(half),
        GROUP=group, TOKENS=TOKENS, num_warps=WARPS,
    )  # fmt: skip
