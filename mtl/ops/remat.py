"""Rematerialisation that torch.func and the compiler keep: save the inputs, run the function again for its pullback."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.func import vjp

from mtl import tree
from mtl.kernels.host_copy import park, unpark
from mtl.kernels.results import Results
from mtl.ops.late import after
from mtl.runtime.stored import stored


def remat(
    fn: Callable[..., Tensor], late: bool = False, away: int | None = None, waits: int | None = None, keeps: bool = False
) -> Callable[..., Tensor]:
    """Wrap a function of trees of tensors (one result) so that its intermediate values are computed again in backward.

    Collectives inside are issued again too. The function must not close over tensors that need a gradient. ``late`` is for what a compiler
    cuts into forward and backward by itself: it would else compute again in forward, and keep. Argument number ``away``, a tensor, waits
    in host memory for backward. Argument number ``waits``, a tensor, is made of the gradient too: whatever is elementwise of it alone a
    compiler would else compute in the kernel that reads it in forward, and keep. With ``keeps`` the function takes ``Results`` at the end:
    what it takes from there is kept, and not computed again.
    """

    def place(args: Any, number: int) -> int:
        return len(tree.leaves(args[:number]))

    def call(*args: Any) -> Tensor:
        leaves, structure = tree.flatten(args)
        if away is None:
            out, *_ = _Remat.apply(fn, structure, late, -1 if waits is None else place(args, waits), keeps, *leaves)  # pyright: ignore
        else:
            out, _ = _RematAway.apply(fn, structure, place(args, away), *leaves)  # pyright: ignore
        assert isinstance(out, Tensor)
        return out

    return call


class _Remat(Function):
    @staticmethod
    def forward(fn: Any, structure: Any, late: bool, waits: int, keeps: bool, *leaves: Any) -> Any:
        results = Results()
        return fn(*tree.unflatten(structure, leaves), *[results] * keeps), *results.noted

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.fn, ctx.structure, ctx.late, ctx.waits, ctx.keeps = inputs[:5]
        ctx.mark_non_differentiable(*output[1:])
        ctx.tensor = [isinstance(x, Tensor) for x in inputs[5:]]
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs[5:]]
        ctx.save_for_backward(*(x for x in inputs[5:] if isinstance(x, Tensor)), *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        count = sum(ctx.tensor)
        tensors, noted = list(ctx.saved_tensors[:count]), [x.view_as(x) for x in ctx.saved_tensors[count:]]
        if ctx.waits >= 0 and not ctx.late:
            place = sum(ctx.tensor[: ctx.waits])
            tensors[place] = stored(after(tensors[place], grad))

        def again(*args: Any) -> Tensor:
            return ctx.fn(*args, *[Results(noted)] * ctx.keeps)

        return None, None, None, None, None, *_pull(ctx, again, tensors, ctx.needs_input_grad[5:], grad, ctx.late)


class _RematAway(Function):
    """The same, but one input is kept in host memory; it is a result too, since only inputs and results can be saved."""

    @staticmethod
    def forward(fn: Any, structure: Any, away: int, *leaves: Any) -> Any:
        return fn(*tree.unflatten(structure, leaves)), park(leaves[away])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.fn, ctx.structure, ctx.away = inputs[:3]
        ctx.mark_non_differentiable(output[1])
        leaves = (*inputs[3 : 3 + ctx.away], output[1], *inputs[4 + ctx.away :])
        ctx.tensor = [isinstance(x, Tensor) for x in leaves]
        ctx.constants = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x for x in leaves if isinstance(x, Tensor)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        tensors, place = list(ctx.saved_tensors), sum(ctx.tensor[: ctx.away])
        tensors[place] = unpark(tensors[place], grad.detach())
        return None, None, None, *_pull(ctx, ctx.fn, tensors, ctx.needs_input_grad[3:], grad)


def _pull(
    ctx: Any, fn: Callable[..., Tensor], tensors: list[Tensor], needs: Sequence[bool], grad: Tensor, late: bool = False
) -> list[Tensor | None]:
    """Run the function again for its pullback: a gradient for each of its leaves."""
    tensors = [x.view_as(x) for x in tensors]  # inside another remat these may be wrappers of a level that has ended: a view is not
    needed = [need for need, is_tensor in zip(needs, ctx.tensor, strict=True) if is_tensor]
    wanted = [i for i, x in enumerate(tensors) if x.is_floating_point() and needed[i]]
    if late:
        tensors = [after(x, grad) if i in wanted else x for i, x in enumerate(tensors)]

    def run(*floating: Tensor) -> Any:
        values = list(tensors)
        for i, x in zip(wanted, floating, strict=True):
            values[i] = x
        rest = iter(values)
        leaves = [next(rest) if is_tensor else c for is_tensor, c in zip(ctx.tensor, ctx.constants, strict=True)]
        return fn(*tree.unflatten(ctx.structure, leaves))

    grads: list[Tensor | None] = [None] * len(tensors)
    for i, g in zip(wanted, vjp(run, *(tensors[i] for i in wanted))[1](grad), strict=True):
        grads[i] = g
    given = iter(grads)
    return [next(given) if is_tensor else None for is_tensor in ctx.tensor]
