"""Attention within documents on the CPU: one document after the other, inside one opaque operation whose shapes are fixed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mtl.kernels import plain
from mtl.kernels.masks import Documents, Mask
from mtl.precision import wide

ROWS = 256
"""Queries whose scores exist at once, where torch's kernel cannot take a document whole."""

_aten: Any = torch.ops.aten
_library: Any = torch.library.Library("mtl", "FRAGMENT")
_MASK = "Tensor query_ends, Tensor key_ends, bool causal, int? window, int offset, float scale"
_library.define(f"document_attention(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor, Tensor)")
_library.define(
    f"document_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}) -> (Tensor, Tensor, Tensor)"
)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents, scale: float) -> plain.Pair:
    """Give (out, logsumexp); a query that sees no key has output 0 and logsumexp -inf."""
    op: Any = torch.ops.mtl.document_attention
    return op(q, k, v, *documents, mask.causal, mask.window, mask.offset, scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents, scale: float
) -> plain.Triple:
    """Give the gradients of queries, keys and values."""
    op: Any = torch.ops.mtl.document_attention_backward
    return op(grad, q, k, v, out, lse, *documents, mask.causal, mask.window, mask.offset, scale)


def _blocks(query_ends: Tensor, key_ends: Tensor, mask: Mask) -> Iterator[tuple[int, slice, slice, Mask, bool]]:
    """List what is to be computed: (row, queries, keys, their mask, whether it is a whole causal square)."""
    for row, (q_ends, k_ends) in enumerate(zip(query_ends.tolist(), key_ends.tolist(), strict=True)):
        q_start, k_start = 0, 0
        for q_stop, k_stop in zip(q_ends, k_ends, strict=True):
            queries, keys, offset = q_stop - q_start, k_stop - k_start, mask.offset + q_start - k_start
            whole = Mask(mask.causal, mask.window, offset)
            if queries and keys and queries == keys and offset == 0 and mask.causal and (mask.window is None or mask.window >= keys):
                yield row, slice(q_start, q_stop), slice(k_start, k_stop), whole, True
            elif queries and keys:
                for first in range(0, queries, ROWS):
                    count = min(ROWS, queries - first)
                    low = 0 if mask.window is None else max(0, offset + first - mask.window + 1)
                    high = min(keys, offset + first + count) if mask.causal else keys
                    if low < high:
                        part = Mask(mask.causal, mask.window, offset + first - low)
                        rows = slice(q_start + first, q_start + first + count)
                        yield row, rows, slice(k_start + low, k_start + high), part, False
            q_start, k_start = q_stop, k_stop


def _forward(
    q: Tensor, k: Tensor, v: Tensor, query_ends: Tensor, key_ends: Tensor, causal: bool, window: int | None, offset: int, scale: float
) -> plain.Pair:
    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide(q.dtype))
    group = q.shape[2] // k.shape[2]
    for row, queries, keys, mask, square in _blocks(query_ends, key_ends, Mask(causal, window, offset)):
        qs, ks, vs = q[row : row + 1, queries], k[row : row + 1, keys], v[row : row + 1, keys]
        if square:
            ks, vs = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (ks, vs))
            o, part = _aten._scaled_dot_product_flash_attention_for_cpu(qs.transpose(1, 2), ks, vs, 0.0, True, scale=scale)
            o = o.transpose(1, 2)
        else:
            o, part = plain.forward(qs, ks, vs, mask, None, scale)
        out[row : row + 1, queries], lse[row : row + 1, :, queries] = o, part
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, query_ends: Tensor, key_ends: Tensor,
    causal: bool, window: int | None, offset: int, scale: float,
) -> plain.Triple:  # fmt: skip
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide(x.dtype)) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    for row, queries, keys, mask, square in _blocks(query_ends, key_ends, Mask(causal, window, offset)):
        here, there = (slice(row, row + 1), queries), (slice(row, row + 1), keys)
        logs = lse[row : row + 1, :, queries].contiguous()
        if square:
            ks, vs = (x[there].repeat_interleave(group, 2) for x in (k, v))
            args = [x.transpose(1, 2) for x in (grad[here], q[here], ks, vs, out[here])]
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, logs, 0.0, True, scale=scale)
            gq, gk, gv = (g.transpose(1, 2) for g in grads)
            gk, gv = (g.unflatten(2, (-1, group)).sum(3) for g in (gk, gv))
        else:
            gq, gk, gv = plain.backward(grad[here], q[here], k[there], v[there], out[here], logs, mask, None, scale)
        dq[here] += gq
        dk[there] += gk
        dv[there] += gv
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _forward_shape(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> plain.Pair:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide(q.dtype))


def _backward_shape(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> plain.Triple:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_library.impl("document_attention", _forward, "CPU")
_library.impl("document_attention_backward", _backward, "CPU")
_library.impl("document_attention", _forward_shape, "Meta")
_library.impl("document_attention_backward", _backward_shape, "Meta")
