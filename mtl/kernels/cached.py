"""Attention of one new token to a cache, on GPUs: one kernel that also turns the query and key and puts key and value into their slot.

As separate operations of a compiler these are nine kernels or so, of about 2 us each, in every layer. The slots of a row are split over
programs, so that one row keeps a GPU busy, and the last program of a row's head joins the parts.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from mtl.kernels.angles import rotate
from mtl.precision import wide

BLOCK = 64
"""Slots read at once."""
PROGRAMS = 264
"""About as many programs as a large GPU runs at once: two a multiprocessor."""
TYPES = (torch.bfloat16, torch.float16, torch.float32)

_library: Any = torch.library.Library("mtl", "FRAGMENT")
_library.define(
    "attend_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slot, Tensor places, Tensor positions, "
    "Tensor(c!) turns, Tensor? cos, Tensor? sin, bool interleaved, int? window, float scale) -> Tensor"
)


def refuses(q: Tensor, keys: Tensor) -> str | None:
    """Say why the kernel cannot do this, or None."""
    if q.device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return "runs on CUDA devices with Triton"
    if q.shape[1] != 1 or q.shape[3] % 2 or q.dtype not in TYPES or keys.dtype != q.dtype:
        return "takes one new token a row and heads of even size, in bfloat16, float16 or float32"
    rows, size = _padded(q.shape[2] // keys.shape[2], q.shape[3])
    if rows * size > 1 << 14 or size > 256:
        return f"has no room for {q.shape[2] // keys.shape[2]} query heads of size {q.shape[3]} a key head"
    return None


def attend_cache(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], slot: Tensor, seen: tuple[Tensor, Tensor, Tensor],
    turn: tuple[Tensor, Tensor, bool] | None, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Put k and v (B, 1, G, K) into ``slot`` [1] of the cache's keys and values (B, T, G, K), and attend with q (B, 1, H, K).

    ``seen`` is (places (B, T), positions (B, 1), turns): slots seen stand at most ``window`` - 1 before the query's position, and turns,
    int32 [B * G] of zeros at first, counts programs from call to call. A slot outside (0, T) puts nothing. With ``turn``, (cos, sin
    (B, 1, K / 2), whether pairs are neighbours), q and k are turned before.
    """
    op: Any = torch.ops.mtl.attend_cache
    cos, sin, interleaved = turn or (None, None, False)
    return op(q, k, v, *cache, slot, *seen, cos, sin, interleaved, window, scale)


def launch(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, places: Tensor, positions: Tensor, turns: Tensor,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Launch the kernel; see `attend_cache`."""
    (rows, _, heads, size), (slots, groups) = q.shape, keys.shape[1:3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if not (keys.is_contiguous() and values.is_contiguous() and places.is_contiguous() and positions.is_contiguous()):
        raise ValueError("attend_cache needs a contiguous cache")
    group, pairs = heads // groups, rows * groups
    padded, wide = _padded(group, size)
    block = BLOCK if padded * wide <= 1 << 13 and wide <= 128 else BLOCK // 2
    chunk = -(-max(-(-slots // max(PROGRAMS // pairs, 1)), 1) // block) * block
    splits = -(-slots // chunk)
    parts = torch.empty(pairs * splits * padded * wide if splits > 1 else 1, dtype=torch.float32, device=q.device)
    stats = torch.empty(2 * pairs * splits * padded if splits > 1 else 1, dtype=torch.float32, device=q.device)
    out = torch.empty(rows, 1, heads, size, dtype=q.dtype, device=q.device)
    half = None if cos is None or sin is None else [x.contiguous() for x in (cos, sin)]
    _kernel()[pairs, splits](
        q, k, v, keys, values, slot, places, positions, *(half or (q, q)), parts, stats, turns, out,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2), slots, groups, window or 0, scale,
        WINDOW=window is not None, GROUP=group, ROWS=padded, SIZE=size, WIDE=wide, BLOCK=block, CHUNK=chunk, SPLITS=splits,
        TURN=0 if half is None else 1 + interleaved,
    )  # fmt: skip
    return out


def plain(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, places: Tensor, positions: Tensor, turns: Tensor,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Do the same in separate operations: what the kernel means; see `attend_cache`."""
    if cos is not None and sin is not None:
        q, k = (rotate(x, cos, sin, "interleaved" if interleaved else "half") for x in (q, k))
    here = (torch.arange(keys.shape[1], device=q.device) == slot).view(1, -1, 1, 1)
    for cache, new in ((keys, k), (values, v)):
        cache.copy_(torch.where(here, new, cache))
    gap = (positions - places)[:, None, None, None]
    seen = (gap >= 0) if window is None else (gap >= 0) & (gap < window)
    kind = wide(q.dtype)
    scores = torch.einsum("bqgmk,btgk->bgmqt", q.to(kind).unflatten(2, (keys.shape[2], -1)), keys.to(kind)) * scale
    odds = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bgmqt,btgk->bqgmk", odds, values.to(kind)).flatten(2, 3).to(q.dtype)


def _shape(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _padded(group: int, size: int) -> tuple[int, int]:
    """Give the sizes of the kernel's tiles, powers of two of at least 16, for ``group`` queries of heads of ``size``."""
    return max(16, 1 << (group - 1).bit_length()), max(16, 1 << (size - 1).bit_length())


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("mtl.kernels.cached_triton").attend


_library.impl("attend_cache", launch, "CUDA")
_library.impl("attend_cache", plain, "CPU")
torch.library.register_fake("mtl::attend_cache", _shape, lib=_library)
