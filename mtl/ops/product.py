"""Products whose operands rest in parts: they travel on the way in; backward keeps the parts alone and lets them travel again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vjp

from mtl.kernels import copy_engine, fp8
from mtl.kernels.columns import beside, cut
from mtl.kernels.products import multiply
from mtl.ops.late import after
from mtl.ops.piecewise import Gathered, Summed
from mtl.sharding.collectives import (
    EXCHANGED,
    exchange_sum_raw,
    gather,
    gather_end,
    gather_raw,
    gather_start,
    scatter_end,
    scatter_raw,
    scatter_start,
    wait,
)


@dataclass(frozen=True)
class Move:
    """How weights go from rest to compute: gathers as (dim, size, group), the type that gradients are summed in and the one at rest.

    Weights side by side, ``split`` of their dimensions being rows, move as one; with ``turns`` their columns take turns. With ``engine``
    the copy engines move them.
    """

    gathers: tuple[tuple[int, int, str], ...]
    reduce: torch.dtype
    rest: torch.dtype
    engine: bool = False
    turns: bool = False

    def fetch(self, shards: Sequence[Tensor], split: int, dtype: torch.dtype) -> Tensor:
        """Bring shards to the weight in use, in a type; without a derivative where it gathers."""
        if self._by_engine(split):
            _, size, group = self.gathers[0]
            whole = wait(copy_engine.gather(list(shards), dtype, size, group, turns=self.turns))
            return whole if len(shards) > 1 else whole.view(size * shards[0].shape[0], *shards[0].shape[1:])
        w = shards[0].to(dtype) if len(shards) == 1 else beside([shard.to(dtype).flatten(split) for shard in shards], self.turns)
        for dim, size, group in self.gathers:
            w = gather_raw(w, dim, size, group)
        return w

    def fetch_rounded(self, shards: Sequence[Tensor], split: int, dtype: torch.dtype, scale: Tensor) -> Tensor:
        """Bring shards, rounded from a type to 8 bits by a scale that is known, to the weight in use as a matrix; without a derivative."""
        if self._by_engine(split):
            _, size, group = self.gathers[0]
            return wait(copy_engine.gather(list(shards), dtype, size, group, scale))
        w = fp8.side_by_side([matrix_of(shard, split) for shard in shards], scale, dtype).view(torch.uint8)
        w = w.view(shards[0].shape if len(shards) == 1 else (*shards[0].shape[:split], w.shape[1]))
        for dim, size, group in self.gathers:
            w = gather_raw(w, dim, size, group)
        return matrix_of(w, split).view(fp8.VALUES)

    def whole(self, shapes: Sequence[torch.Size], split: int) -> list[int]:
        """Give the shape of the weight in use, from its shards'."""
        columns = sum(math.prod(shape[split:]) for shape in shapes)
        whole = list(shapes[0]) if len(shapes) == 1 else [*shapes[0][:split], columns]
        for dim, size, _ in self.gathers:
            whole[dim] *= size
        return whole

    def give(self, grad: Tensor, split: int, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Sum a weight's gradient over devices and cut it into the shards'; without a derivative where it sums."""
        columns = [math.prod(shape[split:]) for shape in shapes]
        if self._by_engine(split):
            _, size, group = self.gathers[0]
            rows = grad.reshape(grad.shape[0], -1)
            parts = copy_engine.collect(copy_engine.send(rows, size, group), rows, columns, self.reduce, size, group, self.turns)
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
        return [part.reshape(shape) for part, shape in zip(cut(grad, columns, self.turns), shapes, strict=True)]

    def _by_engine(self, split: int) -> bool:
        return self.engine and len(self.gathers) == 1 and self.gathers[0][0] == 0 and split == 1


def fetched(dtype: torch.dtype, move: Move, split: int, *shards: Tensor) -> Tensor:
    """Bring shards to the weight in use, in a type; the derivative sums and cuts."""
    out = _Fetch.apply(dtype, move, split, *shards) if move.gathers else move.fetch(shards, split, dtype)
    assert isinstance(out, Tensor)
    return out


def given(move: Move, grad: Tensor, split: int, shapes: list[torch.Size]) -> list[Tensor]:
    """Sum the gradient of a weight in use and cut it into the shards': the transpose of `fetched`."""
    made: Any = _Give.apply(grad, move, split, shapes)
    return list(made)


class _Fetch(Function):
    """Shards at rest to the weight in use."""

    @staticmethod
    def forward(dtype: torch.dtype, move: Move, split: int, *shards: Tensor) -> Tensor:
        return move.fetch(shards, split, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.args, ctx.shapes = inputs[1:3], [shard.shape for shard in inputs[3:]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        move, split = ctx.args
        return None, None, None, *_Give.apply(grad, move, split, ctx.shapes)  # pyright: ignore


class _FetchRounded(Function):
    """Shards at rest to the weight in use in 8 bits, a constant to derivatives."""

    @staticmethod
    def forward(dtype: torch.dtype, move: Move, split: int, scale: Tensor, *shards: Tensor) -> Tensor:
        return move.fetch_rounded(shards, split, dtype, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return (None,) * len(ctx.needs_input_grad)


class _Give(Function):
    """A weight's gradient to the shards': the transpose of `_Fetch`."""

    @staticmethod
    def forward(grad: Tensor, move: Move, split: int, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        return tuple(move.give(grad, split, shapes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtype, ctx.args = inputs[0].dtype, inputs[1:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Fetch.apply(ctx.dtype, *ctx.args, *grads), None, None, None


@dataclass(frozen=True)
class Spread:
    """How an activation that is split along a dimension becomes whole: gathered over a group of ``size`` devices."""

    dim: int
    size: int
    group: str

    def whole(self, part: Tensor) -> Tensor:
        """Gather a part, and give all tokens as rows."""
        return gather(part, self.dim, self.size, self.group).flatten(0, -2)

    def start(self, part: Tensor) -> Tensor:
        """Start to gather, without a derivative."""
        return gather_start(part, self.size, self.group)

    def end(self, started: Tensor) -> Tensor:
        """Give what was gathered as rows."""
        return gather_end(started, self.dim, self.size).flatten(0, -2)

    def send(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Start to sum rows of all tokens over the devices, each of which keeps its part, of a shape; without a derivative."""
        spread = [n * self.size if dim == self.dim else n for dim, n in enumerate(shape)]
        return scatter_start(rows.view(spread), self.dim, self.size, self.group)

    def take(self, sent: Tensor, shape: torch.Size) -> Tensor:
        """Give the sum that was sent."""
        return scatter_end(sent, self.size).view(shape)


@dataclass(frozen=True)
class How:
    """How a product is taken.

    The first ``count`` operands are the activation: rows, or what ``fn`` makes rows of, or with ``spread`` this device's part of it. The
    others are shards of weights, which lie side by side. With ``eight``, how many scales there are, products are taken in 8 bits; with
    ``known`` the weights' one scale is a last operand, and they travel in 8 bits. ``late`` makes what is gathered again wait for the
    gradient; with ``keep`` what travelled in 8 bits is kept, and not gathered again. With ``pieces`` the product is taken in pieces, which
    gather the part, or sum over devices: the activation then is [B, S, columns], not rows. ``quack`` is as in `Parallel`.
    """

    fn: Any
    spread: Spread | None
    split: int
    transposed: bool
    eight: fp8.Scales | None
    move: Move
    count: int
    late: bool = False
    pieces: Gathered | Summed | None = None
    known: bool = False
    keep: bool = False
    quack: int = 0

    def rows(self, *inner: Tensor) -> Tensor:
        """Give the activation as rows."""
        if self.spread is not None:
            return self.spread.whole(*inner)
        return inner[0] if self.fn is None else self.fn(*inner)

    def forward(self, rows: Tensor, matrix: Tensor, scale: Tensor | None = None) -> tuple[Tensor, ...]:
        """Multiply; in 8 bits with one scale a side give those that were found too."""
        if not self.eight:
            return (multiply(self.quack, rows, matrix.t() if self.transposed else matrix),)
        a, b = fp8.side(rows, self.eight, turned=False).plain, self.rounded(matrix, scale, not self.transposed)
        found = (a.scale,) if self.known else (a.scale, b.scale)
        return fp8.multiply(a, b, rows.dtype), *(found if self.eight == "tensor" else ())

    def rounded(self, matrix: Tensor, scale: Tensor | None, turned: bool) -> fp8.Rounded:
        """Give the weights in 8 bits one way: from what travelled so, or rounded here."""
        assert self.eight is not None
        if self.known:
            assert scale is not None
            return fp8.Rounded(fp8.turned(matrix) if turned else matrix, scale)
        w = fp8.side(matrix, self.eight, scale, plain=not turned, turned=turned)
        return w.turned if turned else w.plain

    def gradient(self, grad: Tensor, rows: bool = True, matrix: bool = True) -> Tensor | fp8.Side:
        """Give the gradient as the products take it that make those of the rows and of the matrix."""
        return fp8.side(grad, self.eight, None, rows, matrix, fp8.GRADIENTS) if self.eight else grad

    def to_rows(self, grad: Tensor | fp8.Side, matrix: Tensor, scales: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Give the gradient of the rows, in a type."""
        if isinstance(grad, Tensor):
            return multiply(self.quack, grad, matrix if self.transposed else matrix.t())
        return fp8.multiply(grad.plain, self.rounded(matrix, scales[1] if scales else None, self.transposed), dtype)

    def to_matrix(self, grad: Tensor | fp8.Side, rows: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Give the gradient of the matrix."""
        if isinstance(grad, Tensor):
            return multiply(self.quack, grad.t(), rows) if self.transposed else multiply(self.quack, rows.t(), grad)
        assert self.eight is not None
        g, r = grad.turned, fp8.side(rows, self.eight, scales[0] if scales else None, plain=False).turned
        return fp8.multiply(g, r, rows.dtype) if self.transposed else fp8.multiply(r, g, rows.dtype)

    def pull(self, grad: Tensor, part: Tensor, matrix: Tensor, *scales: Tensor) -> tuple[Tensor, Tensor]:
        """Give the gradients of a part and of the matrix, one after the other."""
        made: Any = vjp(self.rows, part)
        rows, back = made
        given = self.gradient(grad)
        return back(self.to_rows(given, matrix, scales, part.dtype))[0], self.to_matrix(given, rows, scales)


def product(how: How, *tensors: Tensor) -> Tensor:
    """Multiply an activation by weights, all as they rest."""
    made: Any = _Product.apply(how, *tensors)
    return made[0]


class _Product(Function):
    """rows @ the gathered shards, side by side; or fn(*rows) @ them, or a part of the rows, gathered, @ them.

    Keeps rows, or parts, and shards: backward computes fn again and gathers again (ZeRO-3 without recompute of products). After the product
    it gives what its sides were scaled by for 8 bits, and what travelled in them or was gathered in pieces to be kept, which backward
    keeps too.
    """

    @staticmethod
    def forward(how: How, *tensors: Tensor) -> tuple[Tensor, ...]:
        shards = tensors[how.count :]
        if how.known:
            matrix = how.move.fetch_rounded(shards[:-1], how.split, tensors[0].dtype, shards[-1])
            return *how.forward(how.rows(*tensors[: how.count]), matrix, shards[-1]), *((matrix,) if how.keep else ())
        matrix = matrix_of(how.move.fetch(shards, how.split, tensors[0].dtype), how.split)
        if isinstance(how.pieces, Gathered):
            return how.pieces.product(tensors[0], matrix, how.transposed)
        rows = how.rows(*tensors[: how.count])
        if how.pieces is not None:
            return (how.pieces.product(rows, matrix, how.transposed).flatten(0, 1),)
        return how.forward(rows, matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.how, ctx.count = inputs[0], len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        how: How = ctx.how
        # Saved tensors may be wrappers of a torch.func level that has ended (inside remat): a view is not.
        saved = [after(x, grad) if how.late and i < ctx.count else x.view_as(x) for i, x in enumerate(ctx.saved_tensors)]
        end = ctx.count - how.known
        inner, shards, scales = saved[: how.count], saved[how.count : end], saved[ctx.count :]
        wanted, wanted_shards = any(ctx.needs_input_grad[1 : 1 + how.count]), ctx.needs_input_grad[1 + how.count : 1 + end]
        matrix, scales = _again(how, inner[0].dtype, shards, saved[end : ctx.count], scales)
        d_inner: Sequence[Tensor | None] = [None] * how.count
        d_matrix: Tensor | None = None
        if isinstance(how.pieces, Gathered) and wanted:
            d_part, *made = how.pieces.pull(grad, inner[0], tuple(scales), matrix, how.transposed, any(wanted_shards))
            d_inner, d_matrix = [d_part], made[0] if made else None
        elif how.spread is not None and wanted and any(wanted_shards):
            both: Any = _Pull.apply(how, grad, inner[0], matrix, *scales)
            d_inner, d_matrix = [both[0]], both[1]
        else:
            made: Any = (inner[0], None) if how.fn is None and how.spread is None else vjp(how.rows, *inner)
            rows, pull = made
            d_rows: Tensor | None = None
            if isinstance(how.pieces, Summed):
                d_rows, whole = how.pieces.pull(grad.unflatten(0, (rows.shape[0], -1)), matrix, how.transposed)
                grad, rows = whole.flatten(0, 1), rows.flatten(0, 1)
            sides = how.gradient(grad, wanted, any(wanted_shards))
            if wanted:
                d_rows = how.to_rows(sides, matrix, scales, inner[0].dtype) if d_rows is None else d_rows
                d_inner = [d_rows] if pull is None else pull(d_rows)
            if any(wanted_shards):  # frozen weights take none
                d_matrix = how.to_matrix(sides, rows, scales)
        d_shards: list[Tensor | None] = [None] * len(shards)
        if d_matrix is not None:
            shapes = [shard.shape for shard in shards]
            parts = given(how.move, d_matrix.view(how.move.whole(shapes, how.split)), how.split, shapes)
            d_shards = [part if need else None for part, need in zip(parts, wanted_shards, strict=True)]
        return None, *d_inner, *d_shards, *([None] * how.known)


def _again(how: How, dtype: torch.dtype, shards: list[Tensor], known: list[Tensor], found: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Give backward its matrix, gathered again or kept, and the scales of both sides."""
    if not known:
        w = _Fetch.apply(dtype, how.move, how.split, *shards)
        assert isinstance(w, Tensor)
        return matrix_of(w, how.split), found
    matrix = found[1] if how.keep else _FetchRounded.apply(dtype, how.move, how.split, *known, *shards)
    assert isinstance(matrix, Tensor)
    return matrix, [found[0], *known]


class _Pull(Function):
    """`How.pull` with its communication beside its products.

    The part is gathered while the gradient of the rows is made, and that is summed while the matrix's is.
    """

    @staticmethod
    def forward(how: How, grad: Tensor, part: Tensor, matrix: Tensor, *scales: Tensor) -> tuple[Tensor, Tensor]:
        spread = how.spread
        assert spread is not None
        started, given = spread.start(part), how.gradient(grad)
        d_rows = how.to_rows(given, matrix, scales, part.dtype)
        rows = spread.end(started)
        sent = spread.send(d_rows, part.shape)
        d_matrix = how.to_matrix(given, rows, scales)
        return spread.take(sent, part.shape), d_matrix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.how = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = [x.view_as(x) for x in ctx.saved_tensors]
        return None, *vjp(ctx.how.pull, *saved)[1](grads)


def matrix_of(w: Tensor, split: int) -> Tensor:
    """Give a weight as a matrix, its first ``split`` dimensions being rows."""
    return w.flatten(split).flatten(0, split - 1)
