"""Weights in use: fetched from rest to compute layout, and multiplied. FSDP happens here and nowhere else.

A product is spelled like an einsum, ``linear(par, "BSD,DHK->BSHK", x, w)``: the letters name the axes, so the weight's layouts at rest and
in compute, the contraction, and the sum over devices that it may leave all follow from the spelling.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.func import vjp

from mtl.axes import LETTERS
from mtl.kernels import copy_engine, fp8
from mtl.sharding.collectives import EXCHANGED, exchange_sum_raw, gather_raw, scatter_raw, wait
from mtl.sharding.parallel import Parallel


@dataclass(frozen=True)
class _Move:
    """How weights go from rest to compute: gathers as (dim, size, group), the type that gradients are summed in and the one at rest.

    Weights side by side, ``split`` of their dimensions being rows, move as one. With ``engine`` the copy engines move them.
    """

    gathers: tuple[tuple[int, int, str], ...]
    reduce: torch.dtype
    rest: torch.dtype
    engine: bool = False

    def fetch(self, shards: Sequence[Tensor], split: int, dtype: torch.dtype) -> Tensor:
        if self._by_engine(split):
            _, size, group = self.gathers[0]
            whole = wait(copy_engine.gather(list(shards), dtype, size, group))
            return whole if len(shards) > 1 else whole.view(size * shards[0].shape[0], *shards[0].shape[1:])
        w = shards[0] if len(shards) == 1 else torch.cat([shard.to(dtype).flatten(split) for shard in shards], -1)
        w = w.to(dtype)
        for dim, size, group in self.gathers:
            w = gather_raw(w, dim, size, group)
        return w

    def give(self, grad: Tensor, split: int, shapes: Sequence[torch.Size]) -> list[Tensor]:
        columns = [math.prod(shape[split:]) for shape in shapes]
        if self._by_engine(split):
            _, size, group = self.gathers[0]
            rows = grad.reshape(grad.shape[0], -1)
            parts = copy_engine.collect(copy_engine.send(rows, size, group), rows, columns, self.reduce, size, group)
            return [part.view(shape).to(self.rest) for part, shape in zip(parts, shapes, strict=True)]
        for dim, size, group in reversed(self.gathers):
            # Widened before it travels, a product's 16-bit gradient would be twice the bytes with the same bits in them.
            if size <= EXCHANGED and grad.dtype.itemsize < self.reduce.itemsize:
                grad = exchange_sum_raw(grad, dim, size, group, self.reduce)
            else:
                grad = scatter_raw(grad.to(self.reduce), dim, size, group)
        grad = grad.to(self.rest)
        if len(shapes) == 1:
            return [grad]
        return [part.reshape(shape) for part, shape in zip(grad.split(columns, -1), shapes, strict=True)]

    def _by_engine(self, split: int) -> bool:
        return self.engine and len(self.gathers) == 1 and self.gathers[0][0] == 0 and split == 1


Drop = Callable[[Tensor], Tensor]
"""Drops some of what a low-rank adapter takes in, while it is trained."""


def project(par: Parallel, spelling: str, x: Tensor, p: Mapping[str, Any], drop: Drop | None = None) -> Tensor:
    """Multiply by a projection at rest: its weight and, where it has them, its bias and its low-rank adapter (`mtl.lora`)."""
    return linear(par, spelling, x, p["weight"], p.get("bias"), p.get("lora"), drop)


def project_all(
    par: Parallel, x: Tensor, p: Mapping[str, Any], spellings: Mapping[str, str], drops: Mapping[str, Drop] | None = None
) -> list[Tensor]:
    """Multiply one activation by several projections of a layer, name to spelling: in one product where their weights travel alike.

    Weights that lie side by side already are one parameter, under the projections' names `joined`.
    """
    operands = [spelling.split("->")[0].split(",") for spelling in spellings.values()]
    one = p.get(joined(spellings))
    ws = [p[name]["weight"] for name in spellings] if one is None else [one["weight"]]
    products = _products(par, operands[0][0], [right for _, right in operands], x, ws)

    def finished(name: str, y: Tensor) -> Tensor:
        own = p.get(name, {})
        return _finished(par, spellings[name], x, y, own.get("bias"), own.get("lora"), (drops or {}).get(name))

    return [finished(name, y) for name, y in zip(spellings, products, strict=True)]


def joined(names: Iterable[str]) -> str:
    """Name the one weight that several projections' weights make side by side."""
    return "+".join(names)


def may_join(par: Parallel, letters: Sequence[str], ws: Sequence[Tensor]) -> bool:
    """Tell whether stacked weights (L, ...) of one input can lie side by side at rest: none is padded, and they travel alike by rows."""
    moves = [_move(par, right, w) for right, w in zip(letters, ws, strict=True)]
    whole = all(_padded(par, f"L{right}", w) is w for right, w in zip(letters, ws, strict=True))
    return whole and all(move.gathers == moves[0].gathers for move in moves) and all(dim == 0 for dim, _, _ in moves[0].gathers)


def project_of(
    par: Parallel, spelling: str, fn: Callable[..., Tensor], inner: Sequence[Tensor], p: Mapping[str, Any], drop: Drop | None = None
) -> Tensor:
    """Multiply ``fn(*inner)``, which has the shape of ``inner[0]``, by a projection; keep ``inner`` alone for backward.

    Meant for an elementwise ``fn``: computing it again costs less than keeping what it made.
    """
    if "lora" in p:
        return project(par, spelling, fn(*inner), p, drop)
    left, right = spelling.split("->", maxsplit=1)[0].split(",")
    y = _products(par, left, [right], inner[0], [p["weight"]], (fn, *inner))[0]
    return _finished(par, spelling, inner[0], y, p.get("bias"), None, None)


def linear(
    par: Parallel,
    spelling: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    lora: Mapping[str, Tensor] | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """Multiply an activation by a weight at rest.

    In ``"BSF,DF->BRD"`` the shared letters (F) are contracted; if they are split over devices, the sum over those is taken on the way to
    the result's layout (B R D). The bias, of the result's new axes, is at rest too and whole or split like the result. A low-rank adapter
    adds its two thin products before that sum.
    """
    left, right = spelling.split("->", maxsplit=1)[0].split(",")
    return _finished(par, spelling, x, _products(par, left, [right], x, [w])[0], bias, lora, drop)


def _finished(
    par: Parallel, spelling: str, x: Tensor, y: Tensor, bias: Tensor | None, lora: Mapping[str, Tensor] | None, drop: Drop | None
) -> Tensor:
    """Bring a product to its spelled layout, with what is added to it."""
    operands, result = spelling.split("->")
    left, right = operands.split(",")
    shared = "".join(c for c in right if c in left)
    new = "".join(c for c in right if c not in left)
    if lora is not None:
        (thin,) = _products(par, left, [f"{shared}_"], x if drop is None else drop(x), [lora["a"]])
        (more,) = _products(par, left[: -len(shared)] + "_", [f"_{new}"], thin * lora["scale"].to(x.dtype), [lora["b"]])
        y = y + more
    source = left[: -len(shared)] + new
    partial = tuple(axis for c in shared for axis in par.axes(c, "compute"))
    if partial or result != source:
        y = par.reshard(y, source, result, partial)
    return y if bias is None else y + bias.to(y.dtype)


def _products(par: Parallel, left: str, rights: list[str], x: Tensor, ws: list[Tensor], made: Any = None) -> list[Tensor]:
    """Contract the letters that an activation and each weight at rest share, on this device alone.

    One weight for several ``rights`` is theirs side by side.
    ``made`` may be (fn, *inner), where the activation is fn(*inner) and x only shows its shape.
    """
    shared = "".join(c for c in rights[0] if c in left)
    news = ["".join(c for c in right if c not in left) for right in rights]
    transposed = rights[0] != shared + news[0]
    for right, new in zip(rights, news, strict=True):
        if (new + shared if transposed else shared + new) != right or left[-len(shared) :] != shared:
            raise ValueError(f"linear cannot spell {left},{right}: contracted letters must end the activation and start or end the weight")
    if len(ws) == len(rights):
        ws = [_padded(par, right, w) for right, w in zip(rights, ws, strict=True)]
    moves = [_move(par, right, w) for right, w in zip(rights, ws, strict=False)]
    if len(ws) > 1 and (transposed or len(shared) > 1 or not _alike(moves, ws, x.dtype)):
        return [_products(par, left, [right], x, [w])[0] for right, w in zip(rights, ws, strict=True)]
    flat = x.flatten(-len(shared)) if len(shared) > 1 else x
    split = len(news[0]) if transposed else len(shared)
    fn, *inner = made or (None, flat)
    rows = [part.flatten(0, -2) for part in inner]
    eight = par.fp8 and _may_round(rights, rows[0], ws, split, transposed)
    if moves[0].gathers and par.regather:
        y = _Product.apply(fn, split, transposed, eight, moves[0], len(rows), *rows, *ws)
    elif fn is not None or eight:
        w = _moved(x.dtype, moves[0], split, *ws)
        y = _Product.apply(fn, split, transposed, eight, _Move((), w.dtype, w.dtype), len(rows), *rows, w)
    else:
        matrix = _matrix(_moved(x.dtype, moves[0], split, *ws), split)
        y = rows[0] @ (matrix.t() if transposed else matrix)
    assert isinstance(y, Tensor)
    sizes = [[_local_size(par, right, c, w) for c in new] for right, new, w in zip(rights, news, ws * len(rights), strict=False)]
    return [
        part.unflatten(0, flat.shape[:-1]).unflatten(-1, size)
        for part, size in zip(y.split([math.prod(size) for size in sizes], -1), sizes, strict=True)
    ]


def _may_round(rights: list[str], rows: Tensor, ws: list[Tensor], split: int, transposed: bool) -> bool:
    """Tell whether a product can be taken in 8 bits: the layers' projections are, the head and thin adapters are not."""
    columns = ws[0].shape[:split].numel() if transposed else sum(w.shape[split:].numel() for w in ws)
    return not any(c in right for c in "V_" for right in rights) and fp8.fits(*rows.shape, columns)


def _alike(moves: list[_Move], ws: list[Tensor], dtype: torch.dtype) -> bool:
    """Tell whether weights can be one matrix: they travel alike, by rows, and are copied on the way anyway."""
    same = all(move == moves[0] for move in moves) and all(dim == 0 for dim, _, _ in moves[0].gathers)
    return same and (bool(moves[0].gathers) or all(w.dtype != dtype for w in ws))


def fetch(par: Parallel, letters: str, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a weight from rest to its compute layout, padded, in ``dtype``; the derivative scatters."""
    w = _padded(par, letters, w)
    return _moved(dtype, _move(par, letters, w), 1, w)


def gather_step(par: Parallel, letters: str, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a weight for a whole step (rules with GATHER = "step"); no derivative, see `scatter_step`."""
    return _move(par, letters, w, step=True).fetch([w], 1, dtype)


def scatter_step(par: Parallel, letters: str, grad: Tensor, rest: Tensor) -> Tensor:
    """Sum a step's gradient of a gathered weight over devices and keep the part at rest: the transpose of `gather_step`."""
    return _move(par, letters, rest, step=True).give(grad, 1, [rest.shape])[0]


def _moved(dtype: torch.dtype, move: _Move, split: int, *shards: Tensor) -> Tensor:
    out = _Fetch.apply(dtype, move, split, *shards) if move.gathers else move.fetch(shards, split, dtype)
    assert isinstance(out, Tensor)
    return out


def _move(par: Parallel, letters: str, w: Tensor, step: bool = False) -> _Move:
    if (par.rules.gather == "step") != step:
        return _Move((), par.reduce, w.dtype)
    store, compute = par.layout(letters, "store"), par.layout(letters, "compute")
    gathers: list[tuple[int, int, str]] = []
    for dim, (rest, use) in enumerate(zip(store.dims, compute.dims, strict=True)):
        extra = rest[len(use) :]
        if rest[: len(use)] != use:
            raise ValueError(
                f"rules {par.rules.name!r}: {LETTERS[letters[dim]]} rests on {rest} but computes on {use}, which is not a prefix"
            )
        if extra:
            gathers.append((dim, par.mesh.size(extra), par.mesh.group(extra)))
    return _Move(tuple(gathers), par.reduce, w.dtype, par.engine and not step)


def _local_size(par: Parallel, letters: str, letter: str, w: Tensor) -> int:
    if letter == "_":
        return w.shape[letters.index(letter)]
    axes = par.layout(letters, "compute").dims[letters.index(letter)]
    return -(-par.sizes[LETTERS[letter]] // par.mesh.size(axes))


def _padded(par: Parallel, letters: str, w: Tensor) -> Tensor:
    """Pad dimensions that were cut unevenly, so that every device computes on the same shape."""
    short = [0] * (2 * w.dim())
    store = par.layout(letters, "store").dims if par.rules.gather == "layer" else par.layout(letters, "compute").dims
    for dim, c in enumerate(letters):
        name = LETTERS[c]
        if name in par.rules.pad and store[dim]:
            short[2 * (w.dim() - 1 - dim) + 1] = -(-par.sizes[name] // par.mesh.size(store[dim])) - w.shape[dim]
    return F.pad(w, short) if any(short) else w


class _Fetch(Function):
    @staticmethod
    def forward(dtype: torch.dtype, move: _Move, split: int, *shards: Tensor) -> Tensor:
        return move.fetch(shards, split, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.args, ctx.shapes = inputs[1:3], [shard.shape for shard in inputs[3:]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        move, split = ctx.args
        return None, None, None, *_Give.apply(grad, move, split, ctx.shapes)  # pyright: ignore


class _Give(Function):
    @staticmethod
    def forward(grad: Tensor, move: _Move, split: int, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        return tuple(move.give(grad, split, shapes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtype, ctx.args = inputs[0].dtype, inputs[1:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Fetch.apply(ctx.dtype, *ctx.args, *grads), None, None, None


class _Product(Function):
    """rows @ the gathered shards, side by side; or, with ``fn``, fn(*rows) @ them.

    Keeps rows and shards: backward computes fn again and gathers again (ZeRO-3 without recompute of products). With ``eight`` all three
    products are taken in 8 bits.
    """

    @staticmethod
    def forward(fn: Any, split: int, transposed: bool, eight: bool, move: _Move, count: int, *tensors: Tensor) -> Tensor:
        rows = tensors[0] if fn is None else fn(*tensors[:count])
        w = _matrix(move.fetch(tensors[count:], split, rows.dtype), split)
        w = w.t() if transposed else w
        return fp8.matmul(rows, w, fp8.scale_for(rows), fp8.scale_for(w)) if eight else rows @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[6:])
        ctx.args = inputs[:6]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        fn, split, transposed, eight, move, count = ctx.args
        # Saved tensors may be wrappers of a torch.func level that has ended (inside remat): a view is not.
        inner, shards = [x.view_as(x) for x in ctx.saved_tensors[:count]], ctx.saved_tensors[count:]
        wanted, wanted_shards = any(ctx.needs_input_grad[6 : 6 + count]), ctx.needs_input_grad[6 + count :]
        made: Any = (inner[0], None) if fn is None else vjp(fn, *inner)
        rows, pull = made
        w = _Fetch.apply(rows.dtype, move, split, *shards)
        assert isinstance(w, Tensor)
        matrix = _matrix(w, split)
        back = matrix if transposed else matrix.t()
        scale = fp8.scale_for(grad, fp8.GRADIENTS) if eight else grad
        d_inner: Sequence[Tensor | None] = [None] * count
        if wanted:
            d_rows = fp8.matmul(grad, back, scale, fp8.scale_for(matrix), fp8.GRADIENTS) if eight else grad @ back
            d_inner = [d_rows] if pull is None else pull(d_rows)
        d_shards: list[Tensor | None] = [None] * len(shards)
        if any(wanted_shards):  # frozen weights take none
            if eight:
                sides = ((grad, scale, fp8.GRADIENTS), (rows, fp8.scale_for(rows), fp8.VALUES))
                (a, scale_a, type_a), (b, scale_b, type_b) = sides if transposed else reversed(sides)
                d_matrix = fp8.matmul(a.t(), b, scale_a, scale_b, type_a, type_b)
            else:
                d_matrix = grad.t() @ rows if transposed else rows.t() @ grad
            given: Any = _Give.apply(d_matrix.view(w.shape), move, split, [shard.shape for shard in shards])
            d_shards = [part if need else None for part, need in zip(given, wanted_shards, strict=True)]
        return None, None, None, None, None, None, *d_inner, *d_shards


def _matrix(w: Tensor, split: int) -> Tensor:
    return w.flatten(split).flatten(0, split - 1)
