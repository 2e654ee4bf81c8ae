"""Attention within documents on GPUs: FlashAttention 2 over cumulative lengths, as torch ships it and as the flash-attn package does.

All rows are joined to one long sequence, cut at the ends of documents. FlashAttention counts a cut's window from its lower right corner:
the last query stands beside the last key.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl.kernels.masks import Documents, Mask
from mtl.kernels.plain import Pair, Triple

_aten: Any = torch.ops.aten


class Cuts(NamedTuple):
    """Cumulative lengths of queries and keys (int32), the longest cuts, the window, and which queries see anything (None: all may)."""

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    window: tuple[int, int]
    seeing: Tensor | None


def refuses(mask: Mask, queries: int, keys: int) -> str | None:
    """Say why lengths cannot express a mask: else it ends beside the last key, or lets everything be seen, or lies after all keys."""
    if mask.offset == keys - queries or mask.trivial(queries, keys) or (mask.offset >= keys and _left(mask, queries, keys) >= 0):
        return None
    return "has no document masks for queries that end elsewhere than the keys"


def cut(mask: Mask, documents: Documents, queries: int, keys: int) -> Cuts:
    """Say a mask within documents as cumulative lengths and a window."""
    seeing = None
    if mask.trivial(queries, keys):
        window = (-1, -1)
    elif mask.offset == keys - queries:
        window = (-1 if mask.window is None else mask.window - 1, 0 if mask.causal else -1)
    else:  # all queries come after all keys, so the one document with both has the first queries and the last keys
        window = (_left(mask, queries, keys), -1)
        documents, seeing = _shared(documents, queries, keys)
    joined = [_join(ends, length) for ends, length in ((documents.queries, queries), (documents.keys, keys))]
    return Cuts(joined[0], joined[1], (queries, keys), window, seeing)


def _left(mask: Mask, queries: int, keys: int) -> int:
    """Give how far left of its place beside the last keys a query sees."""
    return keys if mask.window is None else mask.window - 1 - (mask.offset - (keys - queries))


def _shared(documents: Documents, queries: int, keys: int) -> tuple[Documents, Tensor]:
    """Cut each row before the shared document's first key, and tell which queries belong to that document."""
    first = (documents.queries > 0).to(torch.int32).argmax(1, keepdim=True)
    starts = torch.cat([torch.zeros_like(documents.keys[:, :1]), documents.keys[:, :-1]], 1).gather(1, first)
    ends = torch.stack([torch.zeros_like(starts), torch.full_like(starts, queries)], 1).squeeze(-1)
    places = torch.arange(queries, device=starts.device)
    seeing = (places < documents.queries.gather(1, first)) & (starts < keys)
    return Documents(ends, torch.cat([starts, torch.full_like(starts, keys)], 1)), seeing


def _join(ends: Tensor, length: int) -> Tensor:
    """Turn the ends within rows [B, D] into cumulative lengths of all rows one after the other, [B D + 1]."""
    rows = torch.arange(ends.shape[0], device=ends.device, dtype=ends.dtype).unsqueeze(1) * length
    return torch.cat([ends.new_zeros(1), (ends + rows).flatten()]).to(torch.int32)


def forward(run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents, scale: float) -> Pair:
    """Give (out, logsumexp); a query that sees no key has output 0 and logsumexp -inf."""
    cuts = cut(mask, documents, q.shape[1], k.shape[1])
    out, lse = run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cuts, scale)
    out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    lse = lse.masked_fill(lse == float("inf"), float("-inf"))  # FlashAttention says inf where nothing is seen
    if cuts.seeing is not None:
        out = out.masked_fill(~cuts.seeing[:, :, None, None], 0.0)
        lse = lse.masked_fill(~cuts.seeing.unsqueeze(1), float("-inf"))
    return out, lse


def backward(
    run: Callable[..., Any], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents,
    scale: float,
) -> Triple:  # fmt: skip
    """Give the gradients of queries, keys and values."""
    cuts = cut(mask, documents, q.shape[1], k.shape[1])
    blind = lse == float("-inf")
    if cuts.seeing is not None:
        grad = grad.masked_fill(~cuts.seeing[:, :, None, None], 0.0)
        blind = blind | ~cuts.seeing.unsqueeze(1)
    lse = lse.masked_fill(blind, float("inf")).transpose(0, 1).flatten(1, 2).contiguous()
    flat = [x.flatten(0, 1) for x in (grad.contiguous(), q, k, v, out)]
    dq, dk, dv = run(*flat, lse, cuts, scale)
    return dq.unflatten(0, q.shape[:2]), dk.unflatten(0, k.shape[:2]), dv.unflatten(0, v.shape[:2])


def torch_forward(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float) -> Pair:
    """Run torch's kernel: queries [B Q, H, K], logsumexp [H, B Q]."""
    left, right = cuts.window
    args = (q, k, v, cuts.queries, cuts.keys, *cuts.longest, 0.0, False, False)
    found = _aten._flash_attention_forward(*args, scale=scale, window_size_left=left, window_size_right=right)
    return found[0], found[1]


def torch_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts, scale: float) -> Triple:
    """Run torch's backward kernel."""
    left, right = cuts.window
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    args = (grad, q, k, v, out, lse, cuts.queries, cuts.keys, *cuts.longest, 0.0, False, state, state)
    dq, dk, dv = _aten._flash_attention_backward(*args, scale=scale, window_size_left=left, window_size_right=right)
    return dq, dk, dv


def package_forward(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float) -> Pair:
    """Run the flash-attn package's kernel."""
    ops: Any = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse = ops._wrapped_flash_attn_varlen_forward(
        q, k, v, cuts.queries, cuts.keys, *cuts.longest, 0.0, scale, False, *cuts.window, 0.0, None, False
    )[:2]
    return out, lse


def package_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts, scale: float) -> Triple:
    """Run the flash-attn package's backward kernel."""
    ops: Any = importlib.import_module("flash_attn.flash_attn_interface")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    exact = torch.are_deterministic_algorithms_enabled()
    args = (grad, q, k, v, out, lse, dq, dk, dv, cuts.queries, cuts.keys, *cuts.longest)
    ops._wrapped_flash_attn_varlen_backward(*args, 0.0, scale, False, *cuts.window, 0.0, None, exact)
    return dq, dk, dv
