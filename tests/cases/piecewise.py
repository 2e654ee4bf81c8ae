"""Products in pieces on real ranks, against the collectives and whole products they stand for."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import grad, vjp

from mtl.kernels import piecewise
from mtl.ops.piecewise import Gathered, Summed
from mtl.ops.product import How, Move, Spread, product
from mtl.sharding.collectives import gather, psum_scatter_over
from mtl.sharding.mesh import MeshShape, make_mesh


def kernels(dtype: str, batch: int) -> dict[str, Any]:
    """Give each operation's largest difference from gloo's collectives and one whole product, and whether it is what its shape says."""
    size = dist.get_world_size()
    group = make_mesh(MeshShape(tensor=size), "cpu").group(("tensor",))
    kind = getattr(torch, dtype)
    torch.manual_seed(dist.get_rank())
    part, rows, grad_part = torch.randn(batch, 6, 10), torch.randn(batch, 6 * size, 5), torch.randn(batch, 6, 7)
    part, rows, grad_part = part.to(kind), rows.to(kind), grad_part.to(kind)
    up, down = torch.randn(10, 4).to(kind), torch.randn(7, 5).to(kind)  # the second is multiplied turned
    y, whole = piecewise.gather_product(part, up, False, size, group)
    want = gather(part, 1, size, group)
    found: dict[str, Any] = {"gathered": _far(whole, want), "product": _far(y, want @ up)}
    found["rows"] = _far(piecewise.gather_rows(part, size, group), want)
    # Two sums under way at once, the first taken last, and a gather between them.
    first = piecewise.product_send(rows, down, True, size, group)
    second = piecewise.product_send(2 * rows, down, True, size, group)
    again, _ = piecewise.gather_product(grad_part, down, False, size, group)
    late = piecewise.product_take(second, rows, 7, size, group)
    soon = piecewise.product_take(first, rows, 7, size, group)
    total = psum_scatter_over(rows @ down.t(), 1, size, group)
    found |= {"sum": _far(soon, total), "doubled": _far(late, 2 * total)}
    found["other way"] = _far(again, gather(grad_part, 1, size, group) @ down)
    found["left"] = len(piecewise._SENT)  # pyright: ignore
    return found


def second_derivatives() -> dict[str, float]:
    """Give the largest relative error of a gradient of a gradient through products in pieces, against the plain ones."""
    size = dist.get_world_size()
    group = make_mesh(MeshShape(tensor=size), "cpu").group(("tensor",))
    torch.manual_seed(dist.get_rank())
    part, inner = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3 * size, 5, dtype=torch.float64)
    w, v = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def norm_of_gradient(gathered: Gathered | None, summed: Summed | None) -> Any:
        def loss(part: Tensor, inner: Tensor, w: Tensor, v: Tensor) -> Tensor:
            spread = Spread(1, size, group)
            up = product(How(None, spread, 1, False, None, Move((), w.dtype, w.dtype), 1, pieces=gathered), part, w)
            if summed is None:
                down = psum_scatter_over((inner.flatten(0, 1) @ v).unflatten(0, (2, -1)), 1, size, group)
            else:
                down = product(How(None, None, 1, False, None, Move((), v.dtype, v.dtype), 1, pieces=summed), inner, v)
            return up.pow(3).sum() + down.reshape(-1).pow(3).sum()

        def squares(*args: Tensor) -> Tensor:
            return sum((g.square().sum() for g in grad(loss, argnums=(0, 1, 2, 3))(*args)), torch.zeros(()))

        return vjp(squares, part, inner, w, v)[1](torch.ones((), dtype=torch.float64))

    want = norm_of_gradient(None, None)
    names = ("part", "inner", "up", "down")
    errors: dict[str, float] = {}
    for keep in (True, False):
        got = norm_of_gradient(Gathered(size, group, keep), Summed(size, group))
        errors |= {f"{n} {keep}": _far(a, b) for n, a, b in zip(names, got, want, strict=True)}
    return errors


def _far(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape)
    return ((got - want).abs().max() / want.abs().max()).item()
