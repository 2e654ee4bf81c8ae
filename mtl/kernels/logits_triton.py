"""Rows of logits on a GPU: each is read once for its softmax's numbers, and once to write its gradient over it."""

import importlib
from typing import Any

import torch
from torch import Tensor

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

BLOCK = 8192
WARPS = 16
LANES, EACH = 512, 8
"""Lanes that read a row side by side, and how many neighbouring logits one takes at a time: 16 bytes in 16 bits."""
LEAST = tl.constexpr(-1e38)
"""Below every logit, and finite: what has seen none yet adds nothing."""


@triton.jit
def _statistics(logits, targets, top, total, picked, stride, real, LANES: tl.constexpr, EACH: tl.constexpr):  # pyright: ignore
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    most = tl.full((LANES,), LEAST, tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, real, LANES * EACH):  # lanes go their own ways: to agree on a largest in every turn took half the time
        x = tl.load(logits + start + columns, mask=start + columns < real, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x, 1))
        sums = sums * tl.exp(most - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        most = higher
    highest = tl.max(most, 0)
    tl.store(top + row, highest)
    tl.store(total + row, tl.sum(sums * tl.exp(most - highest), 0))
    target = tl.load(targets + row)
    here = (target >= 0) & (target < real)
    tl.store(picked + row, tl.load(logits + target, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _to_gradient(logits, targets, lse, share, hit, stride, columns_in_all, real, BLOCK: tl.constexpr):  # pyright: ignore
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target, base = tl.load(targets + row), tl.load(lse + row)
    factor, less = tl.load(share + row), tl.load(hit + row)
    columns = tl.arange(0, BLOCK)
    for start in range(0, columns_in_all, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < real, other=float("-inf")).to(tl.float32)
        value = tl.exp(x - base) * factor - tl.where(at == target, less, 0.0)
        tl.store(logits + at, tl.where(at < real, value, 0.0).to(logits.dtype.element_ty), mask=at < columns_in_all)


def statistics(logits: Tensor, targets: Tensor, real: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give each row's largest logit, sum of exponentials and target's logit, in float32."""
    rows = logits.shape[0]
    top, total, picked = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    targets = targets.contiguous()
    _statistics[(rows,)](logits, targets, top, total, picked, logits.stride(0), real, LANES=LANES, EACH=EACH, num_warps=LANES // 32)
    return top, total, picked


def to_gradient_(logits: Tensor, targets: Tensor, lse: Tensor, share: Tensor, hit: Tensor, real: int) -> None:
    """Write each row's gradient over it."""
    rows, columns = logits.shape
    lse, share, hit = (x.float().contiguous() for x in (lse, share, hit))
    targets = targets.contiguous()
    _to_gradient[(rows,)](
        logits, targets, lse, share, hit, logits.stride(0), columns, real, BLOCK=BLOCK, num_warps=WARPS
    )  # fmt: skip
