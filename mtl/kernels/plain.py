"""The plain attention kernel: ordinary tensor arithmetic with every score at once. The reference of the others; it refuses nothing."""

import torch
from torch import Tensor

from mtl.kernels.masks import Documents, Mask
from mtl.precision import wide

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def masked_scores(q: Tensor, k: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Tensor:
    """Give masked scores [B, N, H / N, Q, T] in at least float32."""
    dtype = wide(q.dtype)
    grouped = q.to(dtype).unflatten(2, (k.shape[2], -1)) * scale
    scores = torch.einsum("bqnmk,btnk->bnmqt", grouped, k.to(dtype))
    if not mask.trivial(q.shape[1], k.shape[1]):
        scores = scores.masked_fill(~mask.pairs(q.shape[1], k.shape[1], q.device), float("-inf"))
    if documents is not None:
        same = documents.pairs(q.shape[1], k.shape[1])
        scores = scores.masked_fill(~same[:, None, None], float("-inf"))
    return scores


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Pair:
    """Give (out, logsumexp); a query that sees no key has output 0 and logsumexp -inf."""
    scores = masked_scores(q, k, mask, documents, scale)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - _finite(lse).unsqueeze(-1))
    out = torch.einsum("bnmqt,btnk->bqnmk", weights, v.to(weights.dtype)).flatten(2, 3)
    return out.to(q.dtype), lse.flatten(1, 2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents | None, scale: float
) -> Triple:
    """Give the gradients of queries, keys and values. ``out`` and ``lse`` may belong to more keys than these."""
    groups = (k.shape[2], -1)
    scores = masked_scores(q, k, mask, documents, scale)
    weights = torch.exp(scores - _finite(lse).unflatten(1, groups).unsqueeze(-1))
    delta = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(-1).transpose(1, 2).unflatten(1, groups)
    return _pull(grad, q, k, v, weights, delta, scale)


def own_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Triple:
    """Give the same where these are all keys, from nothing but the arguments of forward: this one has derivatives itself."""
    scores = masked_scores(q, k, mask, documents, scale)
    weights = torch.exp(scores - _finite(torch.logsumexp(scores, -1)).unsqueeze(-1))
    return _pull(grad, q, k, v, weights, None, scale)


def _pull(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, delta: Tensor | None, scale: float) -> Triple:
    dtype, groups = weights.dtype, (k.shape[2], -1)
    g = grad.to(dtype).unflatten(2, groups)
    dv = torch.einsum("bnmqt,bqnmk->btnk", weights, g)
    dp = torch.einsum("bqnmk,btnk->bnmqt", g, v.to(dtype))
    delta = (weights * dp).sum(-1) if delta is None else delta
    ds = weights * (dp - delta.unsqueeze(-1)) * scale
    dq = torch.einsum("bnmqt,btnk->bqnmk", ds, k.to(dtype)).flatten(2, 3)
    dk = torch.einsum("bnmqt,bqnmk->btnk", ds, q.to(dtype).unflatten(2, groups))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _finite(lse: Tensor) -> Tensor:
    """Replace -inf (a row that sees nothing) so that its weights come out 0, not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
