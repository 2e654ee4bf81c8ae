"""Weights in use: fetched from rest to compute layout, and multiplied. FSDP happens here and nowhere else.

A product is spelled like an einsum, ``linear(par, "BSD,DHK->BSHK", x, w)``: the letters name the axes, so the weight's layouts at rest and
in compute, the contraction, and the sum over devices that it may leave all follow from the spelling.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.axes import LETTERS
from mtl.kernels import fp8
from mtl.ops.piecewise import Gathered, Summed
from mtl.ops.product import How, Move, Spread, fetched, matrix_of, product
from mtl.sharding.parallel import Parallel

Drop = Callable[[Tensor], Tensor]
"""Drops some of what a low-rank adapter takes in, while it is trained."""


class Entry(NamedTuple):
    """The activation of products: how it is spelled, and how it is as it is multiplied.

    It may be ``fn(*made_of)``, which backward computes again; ``x`` then only shows its shape.
    """

    x: Tensor
    letters: str
    inside: str
    fn: Callable[..., Tensor] | None = None
    made_of: Sequence[Tensor] = ()


class Weights(NamedTuple):
    """The weights at rest of products, by spelling, and the scales of those that travel in 8 bits.

    One array for several spellings is theirs side by side.
    """

    letters: Sequence[str]
    arrays: Sequence[Tensor]
    scales: Sequence[Tensor | None]


def project(par: Parallel, spelling: str, x: Tensor, p: Mapping[str, Any], drop: Drop | None = None) -> Tensor:
    """Multiply by a projection at rest: its weight and, where it has them, its bias and its low-rank adapter (`mtl.lora`)."""
    return linear(par, spelling, x, p["weight"], p.get("bias"), p.get("lora"), drop, p.get("scale"))


def project_all(
    par: Parallel, x: Tensor, p: Mapping[str, Any], spellings: Mapping[str, str], drops: Mapping[str, Drop] | None = None
) -> list[Tensor]:
    """Multiply one activation by several projections of a layer, name to spelling: in one product where their weights travel alike.

    Weights that lie side by side already are one parameter, under the projections' names `joined`.
    """
    products = _products(par, *_operands(x, p, spellings))

    def finished(name: str, y: Tensor) -> Tensor:
        own = p.get(name, {})
        return _finished(par, spellings[name], x, y, own.get("bias"), own.get("lora"), (drops or {}).get(name))

    return [finished(name, y) for name, y in zip(spellings, products, strict=True)]


def is_one(par: Parallel, x: Tensor, p: Mapping[str, Any], spellings: Mapping[str, str]) -> bool:
    """Tell whether several projections of one activation are one product, to which nothing is added."""
    bare = not any({"bias", "lora"} & p.get(name, {}).keys() for name in spellings)
    return bare and _is_one(par, *_operands(x, p, spellings))


def project_as_one(par: Parallel, x: Tensor, p: Mapping[str, Any], spellings: Mapping[str, str]) -> tuple[Tensor, list[list[int]]]:
    """Do as `project_all` where `is_one`: give one array, the results side by side, and the sizes of each one's own dimensions."""
    return _one_product(par, *_operands(x, p, spellings))


def _operands(x: Tensor, p: Mapping[str, Any], spellings: Mapping[str, str]) -> tuple[Entry, Weights]:
    operands = [spelling.split("->")[0].split(",") for spelling in spellings.values()]
    names = [joined(spellings)] if joined(spellings) in p else list(spellings)
    weights = Weights([right for _, right in operands], [p[name]["weight"] for name in names], [p[name].get("scale") for name in names])
    left = operands[0][0]
    return Entry(x, left, _inside(left, next(iter(spellings.values())))), weights


def joined(names: Iterable[str]) -> str:
    """Name the one weight that several projections' weights make side by side."""
    return "+".join(names)


def may_join(par: Parallel, letters: Sequence[str], ws: Sequence[Tensor]) -> bool:
    """Tell whether stacked weights (L, ...) of one input can lie side by side at rest: none is padded, and they travel alike by rows."""
    moves = [_move(par, right, w) for right, w in zip(letters, ws, strict=True)]
    whole = all(_padded(par, f"L{right}", w) is w for right, w in zip(letters, ws, strict=True))
    return whole and all(move.gathers == moves[0].gathers for move in moves) and all(dim == 0 for dim, _, _ in moves[0].gathers)


def moves_beside(par: Parallel, letters: str, ws: Sequence[Tensor], dtype: torch.dtype) -> Move | None:
    """Tell how weights spelled alike travel, where several of them can be one matrix in use at no cost and none is padded; else None."""
    moves = [_move(par, letters, w) for w in ws]
    whole = all(_padded(par, letters, w) is w for w in ws)
    return moves[0] if whole and _alike(moves, ws, dtype, spread=False) else None


def at_hand(par: Parallel, letters: str, w: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a weight at rest is used as it lies: neither gathered nor cast nor padded."""
    return w.dtype == dtype and not _move(par, letters, w).gathers and _padded(par, letters, w) is w


def columns_here(par: Parallel, letters: str, shared: str, w: Tensor) -> list[int]:
    """Give the sizes of what this device makes with a weight that contracts the letters ``shared``."""
    return [_local_size(par, letters, c, w) for c in letters if c not in shared]


def project_of(
    par: Parallel, spelling: str, fn: Callable[..., Tensor], inner: Sequence[Tensor], p: Mapping[str, Any], drop: Drop | None = None
) -> Tensor:
    """Multiply ``fn(*inner)``, which has the shape of ``inner[0]``, by a projection; keep ``inner`` alone for backward.

    Meant for an elementwise ``fn``: computing it again costs less than keeping what it made.
    """
    if "lora" in p:
        return project(par, spelling, fn(*inner), p, drop)
    left, right = spelling.split("->", maxsplit=1)[0].split(",")
    summed = _summed(par, spelling)
    y = _product(par, Entry(inner[0], left, left, fn, inner), right, p["weight"], p.get("scale"), summed)
    return _finished(par, spelling, inner[0], y, p.get("bias"), None, None, summed is not None)


def linear(
    par: Parallel,
    spelling: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    lora: Mapping[str, Tensor] | None = None,
    drop: Drop | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Multiply an activation by a weight at rest.

    In ``"BSF,DF->BRD"`` the shared letters (F) are contracted; if they are split over devices, the sum over those is taken on the way to
    the result's layout (B R D). In ``"BRD,DF->BSF"`` the activation's split sequence (R) is gathered on the way in (`Parallel` says
    whether it is kept so). The bias, of the result's new axes, is at rest too and whole or split like the
    result. A low-rank adapter adds its two thin products before that sum; what lies between them is gathered, not the activation.
    A weight whose ``scale`` for 8 bits is known (`mtl.ops.scales`) is gathered in them.
    """
    left, right = spelling.split("->", maxsplit=1)[0].split(",")
    summed = _summed(par, spelling) if lora is None else None  # an adapter is added before the sum
    y = _product(par, Entry(x, left, _inside(left, spelling)), right, w, scale, summed)
    return _finished(par, spelling, x, y, bias, lora, drop, summed is not None)


def _inside(left: str, spelling: str) -> str:
    """Spell an activation as it is multiplied: with its sequence whole where the result's is."""
    return left.replace("R", "S") if "S" in spelling.split("->")[1] else left


def _finished(
    par: Parallel, spelling: str, x: Tensor, y: Tensor, bias: Tensor | None, lora: Mapping[str, Tensor] | None, drop: Drop | None,
    summed: bool = False,
) -> Tensor:  # fmt: skip
    """Bring a product, unless it is ``summed`` already, to its spelled layout, with what is added to it."""
    operands, result = spelling.split("->")
    left, right = operands.split(",")
    shared = "".join(c for c in right if c in left)
    new = "".join(c for c in right if c not in left)
    rest = _inside(left, spelling)[: -len(shared)]
    if lora is not None:
        thin = _product(par, Entry(x if drop is None else drop(x), left, left), f"{shared}_", lora["a"])
        thin = par.reshard(thin * lora["scale"].to(x.dtype), left[: -len(shared)] + "_", f"{rest}_")
        y = y + _product(par, Entry(thin, f"{rest}_", f"{rest}_"), f"_{new}", lora["b"])
    source = rest + new
    partial = tuple(axis for c in shared for axis in par.axes(c, "compute"))
    if not summed and (partial or result != source):
        y = par.reshard(y, source, result, partial)
    return y if bias is None else y + bias.to(y.dtype)


def _product(par: Parallel, entry: Entry, right: str, w: Tensor, scale: Tensor | None = None, summed: Summed | None = None) -> Tensor:
    """Contract the letters that an activation and one weight share, on this device alone, or with the sum over devices that it leaves."""
    return _products(par, entry, Weights([right], [w], [scale]), summed)[0]


def _products(par: Parallel, entry: Entry, weights: Weights, summed: Summed | None = None) -> list[Tensor]:
    """Multiply one activation by several weights: in one product where they can be one matrix."""
    if _is_one(par, entry, weights):
        y, sizes = _one_product(par, entry, weights, summed)
        parts = y.split([math.prod(size) for size in sizes], -1) if len(sizes) > 1 else [y]  # the derivative of a split would copy
        return [part.view(*y.shape[:-1], *size) for part, size in zip(parts, sizes, strict=True)]
    if not par.parts or _spread(par, entry, weights)[0] is None:  # what several products share is gathered once
        entry = entry._replace(x=par.reshard(entry.x, entry.letters, entry.inside), letters=entry.inside)
    return [_product(par, entry, right, w, scale) for right, w, scale in zip(*weights, strict=True)]


def _is_one(par: Parallel, entry: Entry, weights: Weights) -> bool:
    """Tell whether weights are one matrix, or can be: they travel alike, by rows, and are copied on the way anyway, or at no more cost."""
    shared, transposed = _contracted(entry.letters, weights.letters)
    moves = [_move(par, right, w) for right, w in zip(weights.letters, weights.arrays, strict=False)]
    alone = not transposed and len(shared) == 1
    return len(moves) == 1 or (alone and _alike(moves, weights.arrays, entry.x.dtype, _spread(par, entry, weights)[0] is not None))


def _contracted(left: str, rights: Sequence[str]) -> tuple[str, bool]:
    """Give the letters that an activation and its weights share, and whether these end the weights."""
    shared = "".join(c for c in rights[0] if c in left)
    transposed = not rights[0].startswith(shared)
    for right in rights:
        new = "".join(c for c in right if c not in left)
        if (new + shared if transposed else shared + new) != right or left[-len(shared) :] != shared:
            raise ValueError(f"linear cannot spell {left},{right}: contracted letters must end the activation and start or end the weight")
    return shared, transposed


def _one_product(par: Parallel, entry: Entry, weights: Weights, summed: Summed | None = None) -> tuple[Tensor, list[list[int]]]:
    """Take a product of weights that move as one matrix, and say what sizes each one's part of the last dimension has."""
    rights, ws, scales = weights
    shared, transposed = _contracted(entry.letters, rights)
    spread, gathered = _spread(par, entry, weights)
    x, pieces = entry.x if spread is not None else par.reshard(entry.x, entry.letters, entry.inside), gathered or summed
    if len(ws) == len(rights):
        ws = [_padded(par, right, w) for right, w in zip(rights, ws, strict=True)]
    move = _move(par, rights[0], ws[0])
    x = x.flatten(-len(shared)) if len(shared) > 1 else x
    split = len(rights[0]) - len(shared) if transposed else len(shared)
    lead = [n * spread.size if spread is not None and dim == spread.dim else n for dim, n in enumerate(x.shape[:-1])]
    eight = par.fp8 if _may_round(rights, math.prod(lead), x.shape[-1], ws, split, transposed) else None
    inner = entry.made_of or [x]
    inner = inner if spread is not None or pieces is not None else [part.flatten(0, -2) for part in inner]
    how = How(entry.fn, spread, split, transposed, eight, move, len(inner), par.late, pieces, quack=par.quack)
    copied = not move.gathers and all(w.dtype != x.dtype for w in ws)  # a step's own copy of the weights, made once
    known = [scale for scale in scales if scale is not None] if eight == "tensor" and move.gathers else []
    if len(known) == len(ws):
        scale = functools.reduce(torch.minimum, known)  # that of the largest value of all
        y = product(replace(how, known=True, keep=not par.regather), *inner, *ws, scale)
    elif (move.gathers and par.regather) or (spread is not None and not copied):
        y = product(how, *inner, *ws)
    elif (again := entry.fn is not None or spread is not None or pieces is not None or bool(eight)) or par.quack:
        w = fetched(x.dtype, move, split, *ws)
        y = product(replace(how, move=Move((), w.dtype, w.dtype), late=par.late and again), *inner, w)
    else:
        matrix = matrix_of(fetched(x.dtype, move, split, *ws), split)
        y = inner[0] @ (matrix.t() if transposed else matrix)
    if isinstance(pieces, Summed):
        lead[1] //= pieces.size
    return y.view(*lead, y.shape[-1]), [columns_here(par, right, shared, w) for right, w in zip(rights, [*ws] * len(rights), strict=False)]


def _spread(par: Parallel, entry: Entry, weights: Weights) -> tuple[Spread | None, Gathered | None]:
    """Tell how an activation that is split becomes whole on its way into a product, and whether it does so in pieces.

    Nothing where it is not split, or is made whole before the product, which then keeps it so.
    """
    left, shared = entry.letters, _contracted(entry.letters, weights.letters)[0]
    if left == entry.inside:
        return None, None
    dim = left.index("R")
    have, want = par.axes("R"), par.axes("S")
    extra = have[len(want) :]
    if have[: len(want)] != want or par.mesh.size(extra) == 1:
        return None, None
    size, group = par.mesh.size(extra), par.mesh.group(extra)
    able = par.piecewise and par.fp8 is None and left[: -len(shared)] == "BR"
    pieces = Gathered(size, group, keep=not par.parts) if able else None
    return (Spread(dim, size, group) if par.parts or pieces is not None else None), pieces


def _summed(par: Parallel, spelling: str) -> Summed | None:
    """Tell over which devices a product leaves a sum that is taken in pieces, each device keeping its part of the sequence."""
    operands, result = spelling.split("->")
    left, right = operands.split(",")
    shared = "".join(c for c in right if c in left)
    partial = tuple(axis for c in shared for axis in par.axes(c, "compute"))
    if not par.piecewise or par.fp8 is not None or left[: -len(shared)] != "BS" or not result.startswith("BR") or len(partial) != 1:
        return None
    if par.mesh.size(partial) == 1 or par.axes("R") != (*par.axes("S"), *partial):
        return None
    return Summed(par.mesh.size(partial), par.mesh.group(partial))


def _may_round(rights: Sequence[str], rows: int, inner: int, ws: Sequence[Tensor], split: int, transposed: bool) -> bool:
    """Tell whether a product can be taken in 8 bits: the layers' projections are, the head and thin adapters are not."""
    columns = ws[0].shape[:split].numel() if transposed else sum(w.shape[split:].numel() for w in ws)
    return not any(c in right for c in "V_" for right in rights) and fp8.fits(rows, inner, columns)


def _alike(moves: list[Move], ws: Sequence[Tensor], dtype: torch.dtype, spread: bool) -> bool:
    """Tell whether weights can be one matrix: they travel alike, by rows, and are copied on the way anyway, or cost less than a gather."""
    same = all(move == moves[0] for move in moves) and all(dim == 0 for dim, _, _ in moves[0].gathers)
    return same and (spread or bool(moves[0].gathers) or all(w.dtype != dtype for w in ws))


def fetch(par: Parallel, letters: str, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a weight from rest to its compute layout, padded, in ``dtype``; the derivative scatters."""
    w = _padded(par, letters, w)
    return fetched(dtype, _move(par, letters, w), 1, w)


def travels(par: Parallel, letters: str, w: Tensor) -> bool:
    """Tell whether a weight at rest is gathered on its way to use."""
    return bool(_move(par, letters, _padded(par, letters, w)).gathers)


def gather_step(par: Parallel, letters: str, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a weight for a whole step (rules with GATHER = "step"); no derivative, see `scatter_step`."""
    return _move(par, letters, w, step=True).fetch([w], 1, dtype)


def scatter_step(par: Parallel, letters: str, grad: Tensor, rest: Tensor) -> Tensor:
    """Sum a step's gradient of a gathered weight over devices and keep the part at rest: the transpose of `gather_step`."""
    return _move(par, letters, rest, step=True).give(grad, 1, [rest.shape])[0]


def _move(par: Parallel, letters: str, w: Tensor, step: bool = False) -> Move:
    if (par.rules.gather == "step") != step:
        return Move((), par.reduce, w.dtype)
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
    return Move(tuple(gathers), par.reduce, w.dtype, par.engine and not step)


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
