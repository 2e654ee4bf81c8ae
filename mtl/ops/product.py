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
from mtl.ops.late import after
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

    Weights side by side, ``split`` of their dimensions being rows, move as one. With ``engine`` the copy engines move them.
    """

    gathers: tuple[tuple[int, int, str], ...]
    reduce: torch.dtype
    rest: torch.dtype
    engine: bool = False

    def fetch(self, shards: Sequence[Tensor], split: int, dtype: torch.dtype) -> Tensor:
        """Bring shards to the weight in use, in a type; without a derivative where it gathers."""
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
        """Sum a weight's gradient over devices and cut it into the shards'; without a derivative where it sums."""
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


def fetched(dtype: torch.dtype, move: Move, split: int, *shards: Tensor) -> Tensor:
    """Bring shards to the weight in use, in a type; the derivative sums and cuts."""
    out = _Fetch.apply(dtype, move, split, *shards) if move.gathers else move.fetch(shards, split, dtype)
    assert isinstance(out, Tensor)
    return out


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
    others are shards of weights, which lie side by side. With ``eight`` products are taken in 8 bits. ``late`` makes what is gathered again
    wait for the gradient.
    """

    fn: Any
    spread: Spread | None
    split: int
    transposed: bool
    eight: bool
    move: Move
    count: int
    late: bool = False

    def rows(self, *inner: Tensor) -> Tensor:
        """Give the activation as rows."""
        if self.spread is not None:
            return self.spread.whole(*inner)
        return inner[0] if self.fn is None else self.fn(*inner)

    def forward(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """Multiply."""
        w = matrix.t() if self.transposed else matrix
        return fp8.matmul(rows, w, fp8.scale_for(rows), fp8.scale_for(w)) if self.eight else rows @ w

    def scale(self, grad: Tensor) -> Tensor:
        """Give what a gradient is scaled by for 8 bits."""
        return fp8.scale_for(grad, fp8.GRADIENTS) if self.eight else grad

    def to_rows(self, grad: Tensor, scale: Tensor, matrix: Tensor) -> Tensor:
        """Give the gradient of the rows."""
        back = matrix if self.transposed else matrix.t()
        return fp8.matmul(grad, back, scale, fp8.scale_for(matrix), fp8.GRADIENTS) if self.eight else grad @ back

    def to_matrix(self, grad: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
        """Give the gradient of the matrix."""
        if not self.eight:
            return grad.t() @ rows if self.transposed else rows.t() @ grad
        sides = ((grad, scale, fp8.GRADIENTS), (rows, fp8.scale_for(rows), fp8.VALUES))
        (a, scale_a, type_a), (b, scale_b, type_b) = sides if self.transposed else reversed(sides)
        return fp8.matmul(a.t(), b, scale_a, scale_b, type_a, type_b)

    def pull(self, grad: Tensor, part: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Give the gradients of a part and of the matrix, one after the other."""
        scale = self.scale(grad)
        made: Any = vjp(self.rows, part)
        rows, back = made
        return back(self.to_rows(grad, scale, matrix))[0], self.to_matrix(grad, scale, rows)


def product(how: How, *tensors: Tensor) -> Tensor:
    """Multiply an activation by weights, all as they rest."""
    out = _Product.apply(how, *tensors)
    assert isinstance(out, Tensor)
    return out


class _Product(Function):
    """rows @ the gathered shards, side by side; or fn(*rows) @ them, or a part of the rows, gathered, @ them.

    Keeps rows, or parts, and shards: backward computes fn again and gathers again (ZeRO-3 without recompute of products).
    """

    @staticmethod
    def forward(how: How, *tensors: Tensor) -> Tensor:
        rows = how.rows(*tensors[: how.count])
        return how.forward(rows, matrix_of(how.move.fetch(tensors[how.count :], how.split, rows.dtype), how.split))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.how = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        how: How = ctx.how
        # Saved tensors may be wrappers of a torch.func level that has ended (inside remat): a view is not.
        saved = [after(x, grad) if how.late else x.view_as(x) for x in ctx.saved_tensors]
        inner, shards = saved[: how.count], saved[how.count :]
        wanted, wanted_shards = any(ctx.needs_input_grad[1 : 1 + how.count]), ctx.needs_input_grad[1 + how.count :]
        w = _Fetch.apply(inner[0].dtype, how.move, how.split, *shards)
        assert isinstance(w, Tensor)
        matrix = matrix_of(w, how.split)
        d_inner: Sequence[Tensor | None] = [None] * how.count
        d_matrix: Tensor | None = None
        if how.spread is not None and wanted and any(wanted_shards):
            both: Any = _Pull.apply(how, grad, inner[0], matrix)
            d_inner, d_matrix = [both[0]], both[1]
        else:
            made: Any = (inner[0], None) if how.fn is None and how.spread is None else vjp(how.rows, *inner)
            rows, pull = made
            scale = how.scale(grad)
            if wanted:
                d_rows = how.to_rows(grad, scale, matrix)
                d_inner = [d_rows] if pull is None else pull(d_rows)
            if any(wanted_shards):  # frozen weights take none
                d_matrix = how.to_matrix(grad, scale, rows)
        d_shards: list[Tensor | None] = [None] * len(shards)
        if d_matrix is not None:
            given: Any = _Give.apply(d_matrix.view(w.shape), how.move, how.split, [shard.shape for shard in shards])
            d_shards = [part if need else None for part, need in zip(given, wanted_shards, strict=True)]
        return None, *d_inner, *d_shards


class _Pull(Function):
    """`How.pull` with its communication beside its products.

    The part is gathered while the gradient of the rows is made, and that is summed while the matrix's is.
    """

    @staticmethod
    def forward(how: How, grad: Tensor, part: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        spread = how.spread
        assert spread is not None
        started, scale = spread.start(part), how.scale(grad)
        d_rows = how.to_rows(grad, scale, matrix)
        rows = spread.end(started)
        sent = spread.send(d_rows, part.shape)
        d_matrix = how.to_matrix(grad, scale, rows)
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
