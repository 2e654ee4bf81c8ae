"""Tensor-parallel products in pieces, whose gathers and sums travel beside them (`mtl.kernels.piecewise`), and their derivatives.

`Gathered` is a product of what is gathered along the sequence (by columns of weights), `Summed` one that leaves a sum over devices (by
rows). Backward of each is the other: a gathered product's input gradient is sent and summed while the weight's is made, a summed product's
gradient is gathered while the input's is made. Derivatives of derivatives are taken of the plain form.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.func import vjp

from mtl.kernels import piecewise
from mtl.sharding.collectives import gather, psum_scatter_over, wait


@dataclass(frozen=True)
class Gathered:
    """A product of an activation [B, S / size, K] that is gathered on the way in; with ``keep`` the whole one is kept for backward."""

    size: int
    group: str
    keep: bool

    def product(self, part: Tensor, matrix: Tensor, turned: bool) -> tuple[Tensor, ...]:
        """Multiply by [K, N], or by [N, K] turned: gives rows [B * S, N] and, if it is kept, the whole activation. No derivative."""
        y, whole = piecewise.gather_product(part, matrix, turned, self.size, self.group)
        return (y.flatten(0, 1), whole) if self.keep else (y.flatten(0, 1),)

    def pull(self, grad: Tensor, part: Tensor, kept: tuple[Tensor, ...], matrix: Tensor, turned: bool, weights: bool) -> tuple[Tensor, ...]:
        """Give the part's gradient and, if that is asked for, the matrix's."""
        made: Any = _PullGathered.apply(self, turned, weights, grad, part, matrix, *kept)
        return made

    def plain(self, grad: Tensor, part: Tensor, matrix: Tensor, turned: bool, weights: bool) -> tuple[Tensor, ...]:
        """Spell the same with collectives: what the pieces are equal to, and are differentiated by."""
        d_rows = (grad @ (matrix if turned else matrix.t())).unflatten(0, (part.shape[0], -1))
        d_part = psum_scatter_over(d_rows, 1, self.size, self.group)
        return (d_part, _for_matrix(gather(part, 1, self.size, self.group).flatten(0, 1), grad, turned)) if weights else (d_part,)


@dataclass(frozen=True)
class Summed:
    """A product [B, S, K] by a matrix of which devices hold rows: each one takes its part [B, S / size, N] of the sum over them."""

    size: int
    group: str

    def product(self, rows: Tensor, matrix: Tensor, turned: bool) -> Tensor:
        """Multiply by [K, N], or by [N, K] turned, and sum. No derivative."""
        sent = piecewise.product_send(rows, matrix, turned, self.size, self.group)
        return piecewise.product_take(sent, rows, matrix.shape[0 if turned else 1], self.size, self.group)

    def pull(self, grad: Tensor, matrix: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
        """Give the rows' gradient [B, S, K], and the whole gradient [B, S, N] of which the matrix's is made."""
        made: Any = _PullSummed.apply(self, turned, grad, matrix)
        return made

    def plain(self, grad: Tensor, matrix: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
        """Spell the same with collectives."""
        whole = gather(grad, 1, self.size, self.group)
        return whole @ (matrix if turned else matrix.t()), whole


class _PullGathered(Function):
    """The input's gradient is sent while later pieces and the matrix's gradient are made; what was not kept is gathered beside."""

    @staticmethod
    def forward(
        how: Gathered, turned: bool, weights: bool, grad: Tensor, part: Tensor, matrix: Tensor, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        started = None if kept or not weights else piecewise.gather_rows(part, how.size, how.group)
        rows = grad.unflatten(0, (part.shape[0], -1))
        sent = piecewise.product_send(rows, matrix, not turned, how.size, how.group)
        d_matrix: tuple[Tensor, ...] = ()
        if weights:
            whole = kept[0] if started is None else wait(started)
            d_matrix = (_for_matrix(whole.flatten(0, 1), grad, turned),)
        return piecewise.product_take(sent, rows, matrix.shape[1 if turned else 0], how.size, how.group), *d_matrix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.how, ctx.turned, ctx.weights = inputs[:3]
        ctx.kept = len(inputs) - 6
        ctx.save_for_backward(*inputs[3:6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = [x.view_as(x) for x in ctx.saved_tensors]

        def plain(grad: Tensor, part: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
            return ctx.how.plain(grad, part, matrix, ctx.turned, ctx.weights)

        return None, None, None, *vjp(plain, *saved)[1](tuple(grads)), *[None] * ctx.kept


class _PullSummed(Function):
    """The gradient is gathered while the product with what is there is made."""

    @staticmethod
    def forward(how: Summed, turned: bool, grad: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return piecewise.gather_product(grad, matrix, not turned, how.size, how.group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.how, ctx.turned = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = [x.view_as(x) for x in ctx.saved_tensors]
        return None, None, *vjp(lambda grad, matrix: ctx.how.plain(grad, matrix, ctx.turned), *saved)[1](tuple(grads))


def _for_matrix(rows: Tensor, grad: Tensor, turned: bool) -> Tensor:
    return grad.t() @ rows if turned else rows.t() @ grad
