"""From one product with query, key and value to heads that are turned to their positions, and gradients back, each in one pass.

A compiler makes three kernels of each way, and writes the gradients twice: once turned back, once side by side.
"""

from typing import Any

import torch
from torch import Tensor

from mtl.kernels import nvidia
from mtl.kernels.angles import rotate

_library: Any = torch.library.Library("mtl_heads", "DEF")
_library.define("heads_apart(Tensor y, Tensor cos, Tensor sin, int heads, int kv_heads, str pairs) -> (Tensor, Tensor, Tensor)")
_library.define("heads_join(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, str pairs) -> Tensor")


def apart(y: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    """Give query and key [B, S, heads, K], turned as `rotate` does, and value, of [B, S, columns of all three]; without a derivative."""
    op: Any = torch.ops.mtl_heads.heads_apart
    return op(y, cos, sin, heads, kv_heads, pairs)


def join(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """Turn back and lay side by side: the transpose of `apart`; without a derivative."""
    op: Any = torch.ops.mtl_heads.heads_join
    return op(q, k, v, cos, sin, pairs)


def _apart(y: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    kernel = nvidia.module("heads_triton") if y.is_cuda and y.dtype != torch.float64 else None
    if kernel is not None:
        q, k, v = _apart_shape(y, cos, sin, heads, kv_heads, pairs)
        kernel.move(y.contiguous(), q, k, v, *_by_token(y, cos, sin), pairs, back=False)
        return q, k, v
    q, k, v = y.unflatten(-1, (-1, 2 * cos.shape[-1])).split([heads, kv_heads, kv_heads], -2)
    return rotate(q, cos, sin, pairs), rotate(k, cos, sin, pairs), v.clone(memory_format=torch.contiguous_format)


def _join(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    kernel = nvidia.module("heads_triton") if q.is_cuda and q.dtype != torch.float64 else None
    if kernel is not None:
        y = _join_shape(q, k, v, cos, sin, pairs)
        kernel.move(y, q, k, v, *_by_token(y, cos, sin), pairs, back=True)
        return y
    return torch.cat([rotate(q, cos, -sin, pairs), rotate(k, cos, -sin, pairs), v], -2).flatten(-2)


def _by_token(y: Tensor, *angles: Tensor) -> list[Tensor]:
    """Give every token's angles as rows."""
    return [x.expand(*y.shape[:-1], x.shape[-1]).reshape(-1, x.shape[-1]).contiguous() for x in angles]


def _apart_shape(y: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (y.new_empty((*y.shape[:-1], count, 2 * cos.shape[-1])) for count in (heads, kv_heads, kv_heads))
    return q, k, v


def _join_shape(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    return q.new_empty((*q.shape[:-2], (q.shape[-2] + k.shape[-2] + v.shape[-2]) * q.shape[-1]))


for _name, _run, _shape in (("heads_apart", _apart, _apart_shape), ("heads_join", _join, _join_shape)):
    for _key in ("CPU", "CUDA", "XPU", "MPS"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"mtl_heads::{_name}", _shape, lib=_library)
