"""The gradient of attention's queries, added up in a fixed order: cuDNN's own is added up by whichever program comes first.

Its gradients of keys and values are always the same bits: one program sees all queries of a key. So a deterministic run takes
those, and the queries' from here, where one program sees all keys of a query.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from mtl.kernels.once import once

_library: Any = torch.library.Library("mtl_ordered", "DEF")
_library.define("queries(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, bool causal, float scale) -> Tensor")


def refuses() -> str | None:
    """Say why there is no kernel here, or None."""
    return None if torch.version.hip is None and importlib.util.find_spec("triton") else "needs an NVIDIA device and Triton"


def queries(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float) -> Tensor:
    """Give the queries' gradient [B, Q, H, K] for that of the result ``out``, keys and values [B, T, N, K], and lse [B, H, Q]."""
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    op: Any = torch.ops.mtl_ordered.queries
    return once("the ordered gradient of attention", op, grad, q, k, v, lse, delta, causal, scale)


def plain(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, causal: bool, scale: float) -> Tensor:
    """Say what the operation means."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).float() for x in (k, v))
    scores = torch.einsum("bqhk,bthk->bhqt", q.float(), k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    shares = (scores - lse.unsqueeze(-1)).exp()
    pulled = torch.einsum("bqhk,bthk->bhqt", grad.float(), v)
    return torch.einsum("bhqt,bthk->bqhk", shares * (pulled - delta.unsqueeze(-1)) * scale, k).to(q.dtype)


def launch(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, causal: bool, scale: float) -> Tensor:
    """Run the kernel."""
    return importlib.import_module("mtl.kernels.ordered_triton").queries(grad, q, k, v, lse, delta, causal, scale)


def _shape(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, causal: bool, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_library.impl("queries", plain, "CPU")
_library.impl("queries", launch, "CUDA")
_library.impl("queries", _shape, "Meta")
