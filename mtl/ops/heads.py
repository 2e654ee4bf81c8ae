"""Query, key and value out of one product, turned to their positions, with a gradient that is one array again."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from mtl.kernels import heads


def turned_apart(y: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    """Give query and key [B, S, heads, K], turned as `mtl.ops.rotary.rotate` does, and value, of one product [B, S, columns of all three].

    cos and sin are [B, S, K / 2].
    """
    count = y.shape[-1] // (2 * cos.shape[-1]) - 2 * kv_heads
    made: Any = _Apart.apply(y, cos, sin, count, kv_heads, pairs)
    return made


class _Apart(Function):
    """One array to three, turned."""

    @staticmethod
    def forward(y: Tensor, cos: Tensor, sin: Tensor, count: int, kv_heads: int, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
        return heads.apart(y, cos, sin, count, kv_heads, pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.pairs = inputs[5]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Saved tensors may be wrappers of a torch.func level that has ended (inside remat): a view is not.
        return _Join.apply(*grads, *(x.view_as(x) for x in ctx.saved_tensors), ctx.pairs), None, None, None, None, None


class _Join(Function):
    """Three arrays, turned back, to one: the transpose of `_Apart`."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
        return heads.join(q, k, v, cos, sin, pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[3:5])
        ctx.args = inputs[0].shape[-2], inputs[1].shape[-2], inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_Apart.apply(grad, *(x.view_as(x) for x in ctx.saved_tensors), *ctx.args), None, None, None  # pyright: ignore
