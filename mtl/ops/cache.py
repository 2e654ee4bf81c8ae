"""Attention over a cache of keys and values: of the prompt, which fills it, and of the tokens that follow.

A slot holds a key and a value, and beside it lies its place, the position it stands for; what nobody may see yet (or ever: padding)
stands at `NOWHERE`. So prompts of unequal length, windows and any order of the sequence over devices are one comparison. Where the rules
split the slots (B T G K), each device attends to those it holds, and the parts are joined by their sums. The cache is written in place.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.kernels import cached
from mtl.ops.attention import attention, own_heads
from mtl.ops.rotary import rotate
from mtl.precision import wide
from mtl.sharding.collectives import pmax, psum
from mtl.sharding.parallel import Parallel

NOWHERE = 1 << 62
"""The position of a slot that no query reaches."""


def cached_attention(
    par: Parallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream: Mapping[str, Tensor],
    window: int | None = None,
    impl: str = "auto",
    scale: float | None = None,
    pairs: str | None = None,
) -> Tensor:
    """Remember keys and values (B, S, G, K) and attend causally for queries (B, S, H, K).

    With ``pairs`` queries and keys are turned before, by the stream's ``cos`` and ``sin``.

    A stream without ``cached_slot`` is a prompt's: it fills the first slots of the cache and attends to itself. With it, [S], key i goes to
    that slot of this device's part (a number outside is another device's), and the queries at ``positions`` (B, S) see every slot whose
    ``cached_place`` (B, T) they reach; ``cached_turns`` is the kernel's own.
    """
    keys, values = stream["cached_key"], stream["cached_value"]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if "cached_slot" in stream and impl == "auto" and _alone(par, q, keys):
        turn = None if pairs is None else (stream["cos"], stream["sin"], pairs == "interleaved")
        seen = stream["cached_place"], stream["positions"], stream["cached_turns"]
        return cached.attend_cache(q, k, v, (keys, values), stream["cached_slot"], seen, turn, window, factor)
    if pairs is not None:
        q, k = (rotate(x, stream["cos"], stream["sin"], pairs) for x in (q, k))
    if "cached_slot" not in stream:
        keys[:, : k.shape[1]].copy_(k)
        values[:, : v.shape[1]].copy_(v)
        return attention(par, q, k, v, window, None, "loaded" if impl == "auto" else impl, scale)
    put(keys, k, stream["cached_slot"])
    put(values, v, stream["cached_slot"])
    seen = visible(stream["cached_place"], stream["positions"], window)
    q = par.reshard(q, "BSHK", "BQMK").to(wide(q.dtype)) * factor
    k, v = (own_heads(par, par.reshard(x, "BTGK", "BTNK")) for x in (keys, values))
    return par.reshard(_attend(par, q, k, v, seen).to(keys.dtype), "BQMK", "BSHK")


def _alone(par: Parallel, q: Tensor, keys: Tensor) -> bool:
    """Tell whether each device attends with its own heads to all of their slots, by the kernel for it."""
    stays = all(par.layout(a).dims == par.layout(b).dims for a, b in (("BSHK", "BQMK"), ("BTGK", "BTNK")))
    return stays and not par.axes("T") and own_heads(par, keys) is keys and cached.refuses(q, keys) is None


def put(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Write new rows [B, S, ...] to slots [S] of this device's part of a cache [B, T, ...]; slots outside it are another device's."""
    here = ((slots >= 0) & (slots < cache.shape[1])).view(-1, *[1] * (new.dim() - 2))
    inside = slots.clamp(0, cache.shape[1] - 1)
    cache.index_copy_(1, inside, torch.where(here, new.to(cache.dtype), cache.index_select(1, inside)))


def visible(places: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Say which slots [B, T] which queries [B, Q] see, as booleans [B, Q, T]."""
    gap = positions.unsqueeze(2) - places.unsqueeze(1)
    return (gap >= 0) if window is None else (gap >= 0) & (gap < window)


def _attend(par: Parallel, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attend to the slots at hand, in the type of the queries (at least float32), and join the devices that share the sequence."""
    split = par.axes("T")
    scores = _scores(q.unflatten(2, (k.shape[2], -1)), k.to(q.dtype)).masked_fill(~seen[:, None, None], float("-inf"))
    odds = torch.exp(scores - pmax(scores.amax(-1, keepdim=True), split, par.mesh))
    total = psum(odds.sum(-1), split, par.mesh)
    out = psum(_mix(odds, v.to(q.dtype)), split, par.mesh) / total.permute(0, 3, 1, 2).unsqueeze(-1)
    return out.flatten(2, 3)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Multiply queries [B, Q, N, M, K] and keys [B, T, N, K] to [B, N, M, Q, T].

    A GPU reads the cache once if the product is spelled as a sum, which the compiler fuses with the cast; a matrix product would first
    write the cache out again in float32.
    """
    if k.device.type == "cpu":
        return torch.einsum("bqnmk,btnk->bnmqt", q, k)
    return (q.permute(0, 2, 3, 1, 4).unsqueeze(4) * k.permute(0, 2, 1, 3)[:, :, None, None]).sum(-1)


def _mix(odds: Tensor, v: Tensor) -> Tensor:
    """Multiply odds [B, N, M, Q, T] and values [B, T, N, K] to [B, Q, N, M, K]; spelled as `_scores` is."""
    if v.device.type == "cpu":
        return torch.einsum("bnmqt,btnk->bqnmk", odds, v)
    return (odds.unsqueeze(-1) * v.permute(0, 2, 1, 3)[:, :, None, None]).sum(4).permute(0, 3, 1, 2, 4)
