"""ALiBi: attention that falls off linearly with distance, as channels of queries and keys, so that every kernel and every layout has it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.sharding.parallel import Parallel

_CHANNELS = 8
"""Head sizes are padded to a multiple of this, which the GPU kernels need."""


def slopes(heads: int) -> list[float]:
    """Give every head's slope: powers of 2 ** (-8 / heads), and for a number of heads that is no power of two those in between."""
    whole = 2 ** math.floor(math.log2(heads))
    base, between = 2 ** -(8 / whole), 2 ** -(4 / whole)
    return [base**i for i in range(1, whole + 1)] + [between ** (2 * i + 1) for i in range(heads - whole)]


def attended_size(head_size: int, heads: int, kv_heads: int) -> int:
    """Give the head size that `extend` makes."""
    return -(-(head_size + heads // kv_heads) // _CHANNELS) * _CHANNELS


def extend(par: Parallel, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add a channel for each query head of a group: slope x position in the keys, 1 in the query head's own channel.

    q is (B, S, H, K), k and v (B, S, G, K), positions (B, S). A score then has slope x key position added; softmax sees differences of it
    alone. Slope and product are rounded to bfloat16, as Falcon was trained. The result's first K channels are what attention gives.
    """
    heads, kv_heads = par.sizes["heads"], par.sizes["kv_heads"]
    group = heads // kv_heads
    room = attended_size(k.shape[-1], heads, kv_heads) - k.shape[-1] - group
    (first, _), (start, have) = par.span("H"), par.span("G")
    steep = torch.tensor(slopes(heads), device=k.device).bfloat16().unflatten(0, (kv_heads, group))[start : start + have]
    far = steep * positions[..., None, None]
    own = (torch.arange(q.shape[2], device=q.device) + first) % group
    mine = (own.unsqueeze(1) == torch.arange(group, device=q.device)).to(q.dtype).expand(*q.shape[:2], -1, -1)
    q, k = torch.cat([q, mine], -1), torch.cat([k, far.to(k.dtype)], -1)
    return F.pad(q, (0, room)), F.pad(k, (0, room)), F.pad(v, (0, room + group))
