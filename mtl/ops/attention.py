"""Attention over a sequence that may be split over devices: whole, with gathered keys, or as a ring; the table decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mtl.errors import UserError
from mtl.kernels.attention import Kernel, attend, choose
from mtl.kernels.masks import Documents, Mask
from mtl.kernels.results import Results, again
from mtl.sharding.collectives import permute_start, wait
from mtl.sharding.parallel import Parallel


def attention(
    par: Parallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    documents: Tensor | None = None,
    impl: str = "auto",
    scale: float | None = None,
    results: Results | None = None,
) -> Tensor:
    """Attend causally. q is (B, S, H, K), k and v (B, S, G, K); the result is laid out like q.

    documents (B, D) says where the documents of each whole row end (the last at its length); without it a row is one document. However the
    sequence is split, every device knows all ends, so masks are never sent. Scores are multiplied by ``scale``, by default K ** -0.5.
    ``results`` notes what the kernel makes, or has it from a first run.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q = par.reshard(q, "BSHK", "BQMK")
    k, v = (own_heads(par, par.reshard(x, "BSGK", "BTNK")) for x in (k, v))
    split, keys_split = par.axes("Q"), par.axes("T")
    if keys_split and keys_split != split:
        raise UserError(f"rules {par.rules.name!r}: key_seq on {keys_split} needs query_seq on the same axes, not {split}.")
    if keys_split:
        out = _ring(par, q, k, v, window, documents, factor, impl, results or Results())
    else:
        out = _gathered(par, q, k, v, window, documents, factor, impl, results)
    return par.reshard(out, "BQMK", "BSHK")


def chunks(par: Parallel, letter: str = "S") -> tuple[tuple[int, ...], int]:
    """Say which pieces of the sequence this device holds, in order, and into how many it is cut: ((0, 7), 8) in zig-zag order."""
    axes = par.axes(letter)
    return _chunks(par, par.mesh.index(axes), par.mesh.size(axes))


def _chunks(par: Parallel, index: int, size: int) -> tuple[tuple[int, ...], int]:
    if par.rules.order == "zigzag" and size > 1:
        return (index, 2 * size - 1 - index), 2 * size
    return (index,), size


def own_heads(par: Parallel, x: Tensor) -> Tensor:
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


def _ends(ends: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Count how much of each document and those before it lies in spans (start, length) of the sequence: the ends within these alone."""
    parts = [(ends - start).clamp(0, length) for start, length in spans]
    return sum(parts[1:], parts[0])


def _gathered(
    par: Parallel, q: Tensor, k: Tensor, v: Tensor, window: int | None, ends: Tensor | None, scale: float, impl: str, results: Any
) -> Tensor:
    """Attend with every key at hand: each piece of the queries sees the keys up to its own end."""
    mine, pieces = chunks(par, "Q")
    if pieces == 1:
        return attend(q, k, v, Mask(True, window), None if ends is None else Documents(ends, ends), scale, impl, results)
    size = par.mesh.size(par.axes("Q"))
    held = [c for i in range(size) for c in _chunks(par, i, size)[0]]
    length = k.shape[1] // pieces

    def in_order(x: Tensor) -> Tensor:
        parts = x.unflatten(1, (pieces, length))
        return parts if held == sorted(held) else torch.stack([parts.unbind(1)[held.index(c)] for c in range(pieces)], 1)

    k, v = in_order(k), in_order(v)
    out: list[Tensor] = []
    for i, c in enumerate(mine):
        rows = slice(i * length, (i + 1) * length)
        first = 0 if window is None else max(0, (c * length - window + 1) // length)
        keys, values = (x[:, first : c + 1].flatten(1, 2) for x in (k, v))
        part = None
        if ends is not None:
            part = Documents(_ends(ends, [(c * length, length)]), _ends(ends, [(first * length, (c + 1 - first) * length)]))
        out.append(attend(q[:, rows], keys, values, Mask(True, window, (c - first) * length), part, scale, impl, results))
    return torch.cat(out, 1)


def _ring(
    par: Parallel, q: Tensor, k: Tensor, v: Tensor, window: int | None, ends: Tensor | None, scale: float, impl: str, results: Results
) -> Tensor:
    axes = par.axes("Q")
    plan = _Plan(par, (par.mesh.index(axes), par.mesh.size(axes), par.mesh.group(axes)), q.shape[1], window, scale, impl)
    out = _Ring.apply(q, k, v, ends, plan, *results.known())
    assert isinstance(out, tuple)
    results.note(*out)
    return out[0]


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which blocks of a ring step count: slices of the queries and keys at hand with one mask each. ``ring`` is (index, size, group)."""

    par: Parallel
    ring: tuple[int, int, str]
    length: int
    window: int | None
    scale: float
    impl: str

    def held(self, turn: int) -> tuple[int, ...]:
        """Name the pieces of the sequence that come from ``turn`` places behind."""
        index, size, _ = self.ring
        return _chunks(self.par, (index - turn) % size, size)[0]

    def blocks(self, turn: int) -> list[tuple[slice, slice, Mask]]:
        """List the blocks of a turn. Under a window pieces are kept apart, and cut down to what sees and is seen."""
        mine, theirs = self.held(0), self.held(turn)
        whole, piece = slice(0, self.length), self.length // len(mine)
        if self.window is not None:
            pairs = [(i * piece, j * piece, (a - b) * piece) for i, a in enumerate(mine) for j, b in enumerate(theirs)]
            return [block for pair in pairs for block in _seen(*pair, piece, self.window)]
        if len(mine) == 1:
            mask = Mask(True, None, (mine[0] - theirs[0]) * piece)
            return [] if mask.empty(piece, piece) else [(whole, whole, mask)]
        if turn == 0:
            return [(whole, whole, Mask())]
        early = theirs[0] < mine[0]
        return [(whole, slice(0, piece), Mask(causal=False)) if early else (slice(piece, self.length), whole, Mask(causal=False))]

    def documents(self, ends: Any, turn: int, rows: slice, cols: slice) -> Documents | None:
        """Say where documents end within a block."""
        if ends is None:
            return None
        return Documents(_ends(ends, self._spans(self.held(0), rows)), _ends(ends, self._spans(self.held(turn), cols)))

    def _spans(self, pieces: tuple[int, ...], part: slice) -> list[tuple[int, int]]:
        """Say which spans (start, length) of the whole sequence a slice of these pieces holds."""
        size = self.length // len(pieces)
        cuts = [(p, max(part.start, i * size) - i * size, min(part.stop, (i + 1) * size) - i * size) for i, p in enumerate(pieces)]
        return [(p * size + low, high - low) for p, low, high in cuts if low < high]

    def kernel(self, q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> Kernel:
        """Choose the kernel of a block."""
        return choose(self.impl, q, k, mask, documents)

    def turns(self, parts: list[Tensor]) -> Any:
        """Yield (turn, parts) as the parts travel round; the next turn's are on their way while this one's are used."""
        index, size, group = self.ring
        for turn in range(size):
            coming = [permute_start(x.transpose(0, 1), 1, index, size, group) for x in parts] if turn + 1 < size else []
            yield turn, parts
            parts = [wait(x).transpose(0, 1) for x in coming]


def _seen(row: int, col: int, offset: int, piece: int, window: int) -> list[tuple[slice, slice, Mask]]:
    """Cut a pair of pieces, ``offset`` places apart, to the queries that see a key of it and the keys that are seen."""
    if offset < 0 or offset - piece + 1 >= window:
        return []
    queries, skipped = min(piece, window + piece - 1 - offset), max(0, offset - window + 1)
    return [(slice(row, row + queries), slice(col + skipped, col + piece), Mask(True, window, offset - skipped))]


class _Ring(Function):
    """Ring attention: keys and values travel, partial results are joined by their logsumexp; gradients of keys travel with them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, ends: Any, plan: _Plan, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
        return _joined(q, k, v, ends, plan) if out is None or lse is None else again(out, lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[4]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:4], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grads = _RingBackward.apply(grad, *ctx.saved_tensors, ctx.plan)
        assert isinstance(grads, tuple)
        return *grads, *[None] * 4


def _joined(q: Tensor, k: Tensor, v: Tensor, ends: Any, plan: _Plan) -> tuple[Tensor, Tensor]:
    total = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=total.dtype, device=q.device)
    for turn, (keys, values) in plan.turns([k, v]):
        for rows, cols, mask in plan.blocks(turn):
            qs, ks, vs = q[:, rows], keys[:, cols], values[:, cols]
            documents = plan.documents(ends, turn, rows, cols)
            out, part = plan.kernel(qs, ks, mask, documents).forward(qs, ks, vs, mask, documents, plan.scale)
            part = part.to(lse.dtype)
            both = torch.logaddexp(lse[:, :, rows], part)
            safe = both.masked_fill(both == float("-inf"), 0.0)
            old, new = (torch.exp(x - safe).transpose(1, 2).unsqueeze(-1) for x in (lse[:, :, rows], part))
            total = _put(total, total[:, rows] * old + out * new, 1, rows)
            lse = _put(lse, both, 2, rows)
    return total.to(q.dtype), lse


class _RingBackward(Function):
    """The pullback, as a Function of its own because raw collectives refuse torch.func; it has no derivative itself."""

    @staticmethod
    def forward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Any, out: Tensor, lse: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, size, group = plan.ring
        dq = torch.zeros_like(q, dtype=lse.dtype)
        carried = [torch.zeros_like(x, dtype=lse.dtype) for x in (k, v)]
        for turn, (keys, values) in plan.turns([k, v]):
            for rows, cols, mask in plan.blocks(turn):
                qs, ks, vs = q[:, rows], keys[:, cols], values[:, cols]
                documents = plan.documents(ends, turn, rows, cols)
                run = plan.kernel(qs, ks, mask, documents).backward
                args = (grad[:, rows], qs, ks, vs, out[:, rows], lse[:, :, rows].contiguous())
                gq, gk, gv = run(*args, mask, documents, plan.scale)
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
