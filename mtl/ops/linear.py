"""Weights in use: fetched from rest to compute layout, and multiplied. FSDP happens here and nowhere else.

A product is spelled like an einsum, ``linear(par, "BSD,DHK->BSHK", x, w)``: the letters name the axes, so the weight's layouts at rest and
in compute, the contraction, and the sum over devices that it may leave all follow from the spelling.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mtl.axes import LETTERS
from mtl.sharding.collectives import gather_raw, scatter_raw
from mtl.sharding.parallel import Parallel


@dataclass(frozen=True)
class _Move:
    """How one weight goes from rest to compute: gathers as (dim, size, group), the type of its gradients on the wire and at rest."""

    gathers: tuple[tuple[int, int, str], ...]
    reduce: torch.dtype
    rest: torch.dtype

    def fetch(self, shard: Tensor, dtype: torch.dtype) -> Tensor:
        w = shard.to(dtype)
        for dim, size, group in self.gathers:
            w = gather_raw(w, dim, size, group)
        return w

    def give(self, grad: Tensor) -> Tensor:
        grad = grad.to(self.reduce)
        for dim, size, group in reversed(self.gathers):
            grad = scatter_raw(grad, dim, size, group)
        return grad.to(self.rest)


def project(par: Parallel, spelling: str, x: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Multiply by a projection at rest: its weight and, where it has them, its bias and its low-rank adapter (`mtl.lora`)."""
    return linear(par, spelling, x, p["weight"], p.get("bias"), p.get("lora"))


def linear(
    par: Parallel, spelling: str, x: Tensor, w: Tensor, bias: Tensor | None = None, lora: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Multiply an activation by a weight at rest.

    In ``"BSF,DF->BRD"`` the shared letters (F) are contracted; if they are split over devices, the sum over those is taken on the way to
    the result's layout (B R D). The bias, of the result's new axes, is at rest too and whole or split like the result. A low-rank adapter
    adds its two thin products before that sum.
    """
    operands, result = spelling.split("->")
    left, right = operands.split(",")
    shared = "".join(c for c in right if c in left)
    new = "".join(c for c in right if c not in left)
    y = _product(par, left, right, x, w)
    if lora is not None:
        thin = _product(par, left, f"{shared}_", x, lora["a"]) * lora["scale"].to(x.dtype)
        y = y + _product(par, left[: -len(shared)] + "_", f"_{new}", thin, lora["b"])
    source = left[: -len(shared)] + new
    partial = tuple(axis for c in shared for axis in par.axes(c, "compute"))
    if partial or result != source:
        y = par.reshard(y, source, result, partial)
    return y if bias is None else y + bias.to(y.dtype)


def _product(par: Parallel, left: str, right: str, x: Tensor, w: Tensor) -> Tensor:
    """Contract the letters that an activation and a weight at rest share, on this device alone."""
    shared = "".join(c for c in right if c in left)
    new = "".join(c for c in right if c not in left)
    transposed = right != shared + new
    if (new + shared if transposed else shared + new) != right or left[-len(shared) :] != shared:
        raise ValueError(f"linear cannot spell {left},{right}: contracted letters must end the activation and start or end the weight")
    w = _padded(par, right, w)
    move = _move(par, right, w)
    flat = x.flatten(-len(shared)) if len(shared) > 1 else x
    rows = flat.flatten(0, -2)
    split = len(new) if transposed else len(shared)
    if move.gathers and par.regather:
        y = _GatheredMatmul.apply(rows, w, split, transposed, move)
    else:
        matrix = _matrix(_moved(w, x.dtype, move), split)
        y = rows @ (matrix.t() if transposed else matrix)
    assert isinstance(y, Tensor)
    sizes = [_local_size(par, right, c, w) for c in new]
    return y.unflatten(0, flat.shape[:-1]).unflatten(-1, sizes)


def fetch(par: Parallel, letters: str, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a weight from rest to its compute layout, padded, in ``dtype``; the derivative scatters."""
    w = _padded(par, letters, w)
    return _moved(w, dtype, _move(par, letters, w))


def gather_step(par: Parallel, letters: str, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a weight for a whole step (rules with GATHER = "step"); no derivative, see `scatter_step`."""
    return _move(par, letters, w, step=True).fetch(w, dtype)


def scatter_step(par: Parallel, letters: str, grad: Tensor, rest: Tensor) -> Tensor:
    """Sum a step's gradient of a gathered weight over devices and keep the part at rest: the transpose of `gather_step`."""
    return _move(par, letters, rest, step=True).give(grad)


def _moved(w: Tensor, dtype: torch.dtype, move: _Move) -> Tensor:
    out = _Fetch.apply(w, dtype, move) if move.gathers else w.to(dtype)
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
    return _Move(tuple(gathers), par.reduce, w.dtype)


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
    def forward(shard: Tensor, dtype: torch.dtype, move: _Move) -> Tensor:
        return move.fetch(shard, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.move = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Give.apply(grad, ctx.move), None, None


class _Give(Function):
    @staticmethod
    def forward(grad: Tensor, move: _Move) -> Tensor:
        return move.give(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.move, ctx.dtype = inputs[1], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Fetch.apply(grad, ctx.dtype, ctx.move), None


class _GatheredMatmul(Function):
    """rows @ gathered shard. Keeps the shard, not the weight: backward gathers again (ZeRO-3 without recompute)."""

    @staticmethod
    def forward(rows: Tensor, shard: Tensor, split: int, transposed: bool, move: _Move) -> Tensor:
        w = _matrix(move.fetch(shard, rows.dtype), split)
        return rows @ (w.t() if transposed else w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.args = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, shard = ctx.saved_tensors
        split, transposed, move = ctx.args
        w = _Fetch.apply(shard, rows.dtype, move)
        assert isinstance(w, Tensor)
        matrix = _matrix(w, split)
        d_rows = grad @ (matrix if transposed else matrix.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:  # a frozen weight
            return d_rows, None, None, None, None
        d_matrix = grad.t() @ rows if transposed else rows.t() @ grad
        return d_rows, _Give.apply(d_matrix.view(w.shape), move), None, None, None


def _matrix(w: Tensor, split: int) -> Tensor:
    return w.flatten(split).flatten(0, split - 1)
