"""Attention over a sequence that may be split over devices: whole, with gathered keys, or as a ring; the table decides."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mtl.errors import UserError
from mtl.kernels.attention import Kernel, Mask, Segments, attend, choose
from mtl.sharding.collectives import permute_start, wait
from mtl.sharding.parallel import Parallel


def attention(
    par: Parallel, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, segments: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Attend causally. q is (B, S, H, K), k and v (B, S, G, K), segments (B, S) or None; the result is laid out like q."""
    scale = q.shape[-1] ** -0.5
    q = par.reshard(q, "BSHK", "BQMK")
    k, v = (_own_heads(par, par.reshard(x, "BSGK", "BTNK")) for x in (k, v))
    seen = None
    if segments is not None:
        seen = Segments(par.reshard(segments, "BS", "BQ"), par.reshard(segments, "BS", "BT"))
    split, keys_split = par.axes("Q"), par.axes("T")
    if keys_split and keys_split != split:
        raise UserError(f"rules {par.rules.name!r}: key_seq on {keys_split} needs query_seq on the same axes, not {split}.")
    if keys_split:
        out = _ring(par, q, k, v, window, seen, scale, impl)
    else:
        out = _gathered(par, q, k, v, window, seen, scale, impl)
    return par.reshard(out, "BQMK", "BSHK")


def chunks(par: Parallel, letter: str = "S") -> tuple[tuple[int, ...], int]:
    """Say which pieces of the sequence this device holds, in order, and into how many it is cut: ((0, 7), 8) in zig-zag order."""
    axes = par.axes(letter)
    return _chunks(par, par.mesh.index(axes), par.mesh.size(axes))


def _chunks(par: Parallel, index: int, size: int) -> tuple[tuple[int, ...], int]:
    if par.rules.order == "zigzag" and size > 1:
        return (index, 2 * size - 1 - index), 2 * size
    return (index,), size


def _own_heads(par: Parallel, x: Tensor) -> Tensor:
    """Keep the key heads that this device's query heads use, in equal groups (each repeated, where the groups are unequal)."""
    (first, count), (start, have) = par.span("M"), par.span("N")
    group = par.sizes["heads"] // par.sizes["kv_heads"]
    wanted = [(first + i) // group - start for i in range(count)]
    if wanted == [i // (count // have) if count % have == 0 else -1 for i in range(count)]:
        return x
    once = sorted(set(wanted))
    if all(wanted.count(i) == count // len(once) for i in once):
        return x.narrow(2, once[0], len(once))
    return x.index_select(2, torch.tensor(wanted, device=x.device))


def _gathered(par: Parallel, q: Tensor, k: Tensor, v: Tensor, window: int | None, seen: Segments | None, scale: float, impl: str) -> Tensor:
    """Attend with every key at hand: each piece of the queries sees the keys up to its own end."""
    mine, pieces = chunks(par, "Q")
    if pieces == 1:
        return attend(q, k, v, Mask(True, window), seen, scale, impl)
    size = par.mesh.size(par.axes("Q"))
    held = [c for i in range(size) for c in _chunks(par, i, size)[0]]
    length = k.shape[1] // pieces

    def in_order(x: Tensor) -> Tensor:
        parts = x.unflatten(1, (pieces, length))
        return parts if held == sorted(held) else parts[:, torch.tensor([held.index(c) for c in range(pieces)], device=x.device)]

    k, v = in_order(k), in_order(v)
    key_segments = None if seen is None else in_order(seen.keys)
    out: list[Tensor] = []
    for i, c in enumerate(mine):
        rows = slice(i * length, (i + 1) * length)
        first = 0 if window is None else max(0, (c * length - window + 1) // length)
        keys, values = (x[:, first : c + 1].flatten(1, 2) for x in (k, v))
        part = None
        if seen is not None and key_segments is not None:
            part = Segments(seen.queries[:, rows], key_segments[:, first : c + 1].flatten(1, 2))
        out.append(attend(q[:, rows], keys, values, Mask(True, window, (c - first) * length), part, scale, impl))
    return torch.cat(out, 1)


def _ring(par: Parallel, q: Tensor, k: Tensor, v: Tensor, window: int | None, seen: Segments | None, scale: float, impl: str) -> Tensor:
    axes = par.axes("Q")
    size, index, group = par.mesh.size(axes), par.mesh.index(axes), par.mesh.group(axes)
    plan = _Plan(par, index, size, group, q.shape[1], window, scale, impl)
    sq, sk = (None, None) if seen is None else seen
    out = _Ring.apply(q, k, v, sq, sk, plan)
    assert isinstance(out, tuple)
    return out[0]


class _Plan:
    """Which blocks of a ring step count: slices of the queries and keys at hand with one mask each."""

    def __init__(self, par: Parallel, index: int, size: int, group: str, length: int, window: int | None, scale: float, impl: str) -> None:
        self.par, self.ring, self.length = par, (index, size, group), length
        self.window, self.scale, self.impl = window, scale, impl

    def blocks(self, turn: int, split: bool) -> list[tuple[slice, slice, Mask]]:
        """List the blocks of a turn, when the keys come from ``turn`` places behind. ``split`` keeps pieces apart (for windows)."""
        index, size, _ = self.ring
        mine = _chunks(self.par, index, size)[0]
        theirs = _chunks(self.par, (index - turn) % size, size)[0]
        whole, piece = slice(0, self.length), self.length // len(mine)
        if not split and len(mine) == 1:
            relation = [(whole, whole, Mask(True, None, (mine[0] - theirs[0]) * piece))]
        elif not split and turn == 0:
            relation = [(whole, whole, Mask())]
        elif not split:
            early = theirs[0] < mine[0]
            relation = [(whole, slice(0, piece), Mask(causal=False)) if early else (slice(piece, self.length), whole, Mask(causal=False))]
        else:
            relation = [
                (slice(i * piece, (i + 1) * piece), slice(j * piece, (j + 1) * piece), Mask(True, self.window, (a - b) * piece))
                for i, a in enumerate(mine)
                for j, b in enumerate(theirs)
            ]
        return [(r, c, m) for r, c, m in relation if not m.empty(r.stop - r.start, c.stop - c.start)]

    def kernel(self, q: Tensor, k: Tensor, mask: Mask, segments: Segments | None) -> Kernel:
        return choose(self.impl, q, k, mask, segments)

    def turns(self, parts: list[Tensor]) -> Any:
        """Yield (turn, parts) as the parts travel round; the next turn's are on their way while this one's are used."""
        index, size, group = self.ring
        for turn in range(size):
            coming = [permute_start(x.transpose(0, 1), 1, index, size, group) for x in parts] if turn + 1 < size else []
            yield turn, parts
            parts = [wait(x).transpose(0, 1) for x in coming]


class _Ring(Function):
    """Ring attention: keys and values travel, partial results are joined by their logsumexp; gradients of keys travel with them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, sq: Any, sk: Any, plan: _Plan) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=total.dtype, device=q.device)
        for turn, parts in plan.turns([k, v] if sk is None else [k, v, sk]):
            for rows, cols, mask in plan.blocks(turn, plan.window is not None):
                qs, ks, vs = q[:, rows], parts[0][:, cols], parts[1][:, cols]
                segments = None if sk is None else Segments(sq[:, rows], parts[2][:, cols])
                out, part = plan.kernel(qs, ks, mask, segments).forward(qs, ks, vs, mask, segments, plan.scale)
                part = part.to(lse.dtype)
                both = torch.logaddexp(lse[:, :, rows], part)
                safe = both.masked_fill(both == float("-inf"), 0.0)
                old, new = (torch.exp(x - safe).transpose(1, 2).unsqueeze(-1) for x in (lse[:, :, rows], part))
                total = _put(total, total[:, rows] * old + out * new, 1, rows)
                lse = _put(lse, both, 2, rows)
        return total.to(q.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[5]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:5], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grads = _RingBackward.apply(grad, *ctx.saved_tensors, ctx.plan)
        assert isinstance(grads, tuple)
        return *grads, None, None, None


class _RingBackward(Function):
    """The pullback, as a Function of its own because raw collectives refuse torch.func; it has no derivative itself."""

    @staticmethod
    def forward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sq: Any, sk: Any, out: Tensor, lse: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, size, group = plan.ring
        dq = torch.zeros_like(q, dtype=lse.dtype)
        carried = [torch.zeros_like(x, dtype=lse.dtype) for x in (k, v)]
        for turn, parts in plan.turns([k, v] if sk is None else [k, v, sk]):
            for rows, cols, mask in plan.blocks(turn, plan.window is not None):
                qs, ks, vs = q[:, rows], parts[0][:, cols], parts[1][:, cols]
                segments = None if sk is None else Segments(sq[:, rows], parts[2][:, cols])
                run = plan.kernel(qs, ks, mask, segments).backward
                args = (grad[:, rows], qs, ks, vs, out[:, rows], lse[:, :, rows].contiguous())
                gq, gk, gv = run(*args, mask, segments, plan.scale)
                dq = _put(dq, dq[:, rows] + gq, 1, rows)
                carried = [_put(c, c[:, cols] + g, 1, cols) for c, g in zip(carried, (gk, gv), strict=True)]
            sent = [permute_start(c.transpose(0, 1), 1, index, size, group) for c in carried]
            carried = [wait(c).transpose(0, 1) for c in sent]
        return dq.to(q.dtype), carried[0].to(k.dtype), carried[1].to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("ring attention has no second derivative: use rules that gather keys (context) for it")


def _put(x: Tensor, part: Tensor, dim: int, where: slice) -> Tensor:
    return part if part.shape == x.shape else torch.slice_scatter(x, part.to(x.dtype), dim, where.start, where.stop)
