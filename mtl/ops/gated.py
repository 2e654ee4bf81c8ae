"""An MLP with a gate, by kernels that hold the gate: what lies between its two products is never read again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd import Function

from mtl.kernels import gated
from mtl.kernels.products import multiply
from mtl.ops.late import after
from mtl.ops.linear import moves_beside
from mtl.ops.product import Move, fetched, given
from mtl.sharding.parallel import Parallel

NAMES = ("gate", "up", "down")


@dataclass(frozen=True)
class How:
    """How an MLP is taken: its activation, the device's multiprocessors, and how its weights move; gate's and up's move as one."""

    kind: str
    units: int
    wide: Move
    down: Move
    late: bool


def fits(par: Parallel, kind: str, x: Tensor, p: Mapping[str, Any]) -> bool:
    """Tell whether the kernels take an MLP: weights alone, the hidden size whole, the sequence as around it, and large."""
    if not par.gated or par.fp8 or par.piecewise or any(p.get(name, {}).keys() != {"weight"} for name in NAMES):
        return False
    if par.mesh.size(par.axes("F", "compute")) > 1 or par.axes("R") != par.axes("S"):
        return False
    ws = [p[name]["weight"] for name in NAMES]
    if moves_beside(par, "DF", ws, x.dtype) is None:
        return False
    return gated.fits(par.quack, kind, x.numel() // x.shape[-1], x.shape[-1], ws[0].shape[1])


def mlp(par: Parallel, kind: str, x: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Give (activation(x @ gate) x (x @ up)) @ down.t(), where `fits`; backward keeps the input and the products with gate and up."""
    gate, up, down = operands = [p[name]["weight"] for name in NAMES]
    narrow = moves_beside(par, "DF", operands, x.dtype)
    assert narrow is not None, "mlp is for what fits"
    wide = replace(narrow, turns=True)
    again = bool(wide.gathers) and par.regather
    if not again:  # a step's own copies of the weights, made once
        operands = [fetched(x.dtype, wide, 1, gate, up), fetched(x.dtype, narrow, 1, down)]
        wide, narrow = (Move((), w.dtype, w.dtype) for w in operands)
    made: Any = _Mlp.apply(How(kind, par.quack, wide, narrow, par.late and again), x.flatten(0, -2), *operands)
    return made[0].view(x.shape)


class _Mlp(Function):
    """The MLP of rows, and what gate and up made, for backward. Weights are shards, which backward fetches again."""

    @staticmethod
    def forward(how: How, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        pairs, inner = gated.forward(x, how.wide.fetch(weights[:-1], 1, x.dtype), how.kind)
        return multiply(how.units, inner, how.down.fetch(weights[-1:], 1, x.dtype).t()), pairs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # zeros would be made for what has no gradient
        ctx.how = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        how: How = ctx.how
        # Saved tensors may be wrappers of a torch.func level that has ended (inside remat): a view is not.
        x, *weights, pairs = (t.view_as(t) for t in ctx.saved_tensors)
        weights = [after(w, grad) if how.late else w for w in weights]
        need_x, *need = ctx.needs_input_grad[1:]
        d_pairs, inner = gated.backward(grad, fetched(x.dtype, how.down, 1, weights[-1]), pairs, how.kind)
        d_down = given(how.down, multiply(how.units, grad.t(), inner), 1, [weights[-1].shape]) if need[-1] else [None]
        wide = fetched(x.dtype, how.wide, 1, *weights[:-1])
        d_x = multiply(how.units, d_pairs, wide.t()) if need_x else None
        d_wide: list[Tensor | None] = [None] * len(need[:-1])
        if any(need[:-1]):
            d_wide[:] = given(how.wide, multiply(how.units, x.t(), d_pairs), 1, [w.shape for w in weights[:-1]])
        return None, d_x, *(d if wanted else None for d, wanted in zip([*d_wide, *d_down], need, strict=True))
