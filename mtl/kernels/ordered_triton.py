# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""The gradient of attention's queries on a GPU: a program has some queries of a head and goes through their keys in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL, LARGE = (64, 64, 4, 3), (128, 64, 8, 3)
"""Queries and keys at once, warps and stages, for heads up to 64 and for larger: the fastest of eight on an H200."""


@triton.jit
def _part(
    dq, q, grad, base, delta, k, v, at, row, step_k, step_v, length, dims, scale,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, masked: tl.constexpr, causal: tl.constexpr,
):  # fmt: skip
    column = at + tl.arange(0, COLUMNS)
    inside = (dims[None, :] < SIZE) & (column[:, None] < length)
    keys = tl.load(k + column[:, None].to(tl.int64) * step_k + dims[None, :], mask=inside, other=0.0)
    values = tl.load(v + column[:, None].to(tl.int64) * step_v + dims[None, :], mask=inside, other=0.0)
    share = tl.exp2(tl.dot(q, tl.trans(keys)) * scale - base[:, None])
    if masked:
        seen = column[None, :] < length
        if causal:
            seen = seen & (column[None, :] <= row[:, None])
        share = tl.where(seen, share, 0.0)
    pulled = tl.dot(grad, tl.trans(values))
    return tl.dot((share * (pulled - delta[:, None])).to(keys.dtype), keys, dq)


@triton.jit
def _queries(
    grad, q, k, v, lse, delta, dq, grad_b, grad_s, grad_h, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, heads, group, queries, length,
    scale, SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, causal: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys begin
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    b, h, n = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    row, dims = block * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (row[:, None] < queries) & (dims[None, :] < SIZE)
    wide = row[:, None].to(tl.int64)
    rows = tl.load(q + b * q_b + h * q_h + wide * q_s + dims[None, :], mask=inside, other=0.0)
    pull = tl.load(grad + b * grad_b + h * grad_h + wide * grad_s + dims[None, :], mask=inside, other=0.0)
    place = (b * heads + h) * queries + row
    base = tl.load(lse + place, mask=row < queries, other=0.0) * 1.4426950408889634  # powers of 2 are what the device computes
    less = tl.load(delta + place, mask=row < queries, other=0.0)
    k += b * k_b + n * k_h
    v += b * v_b + n * v_h
    total = tl.zeros((ROWS, PADDED), tl.float32)
    end = tl.minimum((block + 1) * ROWS, length) if causal else length
    whole = (block * ROWS if causal else length) // COLUMNS * COLUMNS  # keys that every query of the program sees
    whole = tl.minimum(whole, length // COLUMNS * COLUMNS)
    log = scale * 1.4426950408889634
    for at in range(0, whole, COLUMNS):
        total = _part(total, rows, pull, base, less, k, v, at, row, k_s, v_s, length, dims, log, SIZE, COLUMNS, False, causal)
    for at in range(whole, end, COLUMNS):
        total = _part(total, rows, pull, base, less, k, v, at, row, k_s, v_s, length, dims, log, SIZE, COLUMNS, True, causal)
    out = dq + ((b * queries + wide) * heads + h) * SIZE + dims[None, :]
    tl.store(out, (total * scale).to(dq.dtype.element_ty), mask=inside)


def queries(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, causal: bool, scale: float) -> Tensor:
    """Give the queries' gradient."""
    batch, count, heads, size = q.shape
    grad, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, q, k, v))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [n for x in (grad, q, k, v) for n in x.stride()[:3]]
    rest = (heads, heads // k.shape[2], count, k.shape[1], scale)
    queries_at_once, keys_at_once, warps, stages = SMALL if size <= 64 else LARGE
    _queries[(triton.cdiv(count, queries_at_once), batch * heads)](
        grad, q, k, v, lse.contiguous(), delta.contiguous(), dq, *strides, *rest,
        SIZE=size, PADDED=max(16, triton.next_power_of_2(size)), ROWS=queries_at_once, COLUMNS=keys_at_once, causal=causal,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq
