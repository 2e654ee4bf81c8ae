"""Gradient transforms as (init, update) pairs, and `chain`. Trees in, trees out; sharded or not makes no difference to them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl import tree
from mtl.precision import wide

_foreach_norm: Any = torch._foreach_norm  # pyright: ignore


class Transform(NamedTuple):
    """``init(params)`` makes the state; ``update(updates, state, params)`` gives (updates, state)."""

    init: Callable[[tree.Tree], Any]
    update: Callable[[tree.Tree, Any, tree.Tree], tuple[tree.Tree, Any]]


class Optimizer(NamedTuple):
    """``init(params)`` makes the state; ``update(grads, state, params, rate, good)`` gives (params, state).

    ``rate`` and ``good`` are device scalars. Where good is false nothing changes. An update may write into what it is given. One that
    calls kernels which the compiler does not know says ``compiles=False``.
    """

    init: Callable[[tree.Tree], Any]
    update: Callable[[tree.Tree, Any, tree.Tree, Tensor, Tensor], tuple[tree.Tree, Any]]
    compiles: bool = True


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after the other."""

    def init(params: tree.Tree) -> Any:
        return tuple(t.init(params) for t in transforms)

    def update(updates: tree.Tree, state: Any, params: tree.Tree) -> tuple[tree.Tree, Any]:
        states: list[Any] = []
        for t, s in zip(transforms, state, strict=True):
            updates, s = t.update(updates, s, params)  # noqa: PLW2901 (the chain's point)
            states.append(s)
        return updates, tuple(states)

    return Transform(init, update)


def scale_by_adam(b1: float, b2: float, eps: float) -> Transform:
    """Divide the running mean of gradients by the root of the running mean of their squares (Adam, with bias correction)."""

    def init(params: tree.Tree) -> Any:
        count = torch.zeros((), dtype=torch.float32, device=tree.leaves(params)[0].device)
        return {"mean": tree.map(torch.zeros_like, params), "square": tree.map(torch.zeros_like, params), "count": count}

    def update(grads: tree.Tree, state: Any, params: tree.Tree) -> tuple[tree.Tree, Any]:
        count = state["count"] + 1.0
        mean = tree.map(lambda m, g: m * b1 + g * (1.0 - b1), state["mean"], grads)
        square = tree.map(lambda s, g: s * b2 + g * g * (1.0 - b2), state["square"], grads)
        exact = count.to(tree.leaves(params)[0].dtype)
        fix1, fix2 = 1.0 - b1**exact, (1.0 - b2**exact).sqrt()
        updates = tree.map(lambda m, s: (m / fix1) / (s.sqrt() / fix2 + eps), mean, square)
        return updates, {"mean": mean, "square": square, "count": count}

    return Transform(init, update)


def momentum(decay: float, nesterov: bool = False) -> Transform:
    """Sum gradients with a decay (SGD with momentum, as torch.optim.SGD defines it)."""

    def init(params: tree.Tree) -> Any:
        return {"trace": tree.map(torch.zeros_like, params)}

    def update(grads: tree.Tree, state: Any, params: tree.Tree) -> tuple[tree.Tree, Any]:
        trace = tree.map(lambda t, g: t * decay + g, state["trace"], grads)
        return (tree.map(lambda t, g: g + t * decay, trace, grads) if nesterov else trace), {"trace": trace}

    return Transform(init, update)


def add_decayed_weights(rate: float, mask: tree.Tree) -> Transform:
    """Add ``rate`` times the parameter where ``mask`` (a tree of booleans) is true."""

    def update(updates: tree.Tree, state: Any, params: tree.Tree) -> tuple[tree.Tree, Any]:
        return tree.map(lambda u, p, yes: u + p * rate if yes else u, updates, params, mask), state

    return Transform(lambda params: (), update)


def descend(transform: Transform) -> Optimizer:
    """Make an optimizer that goes ``rate`` times the update downhill, and nowhere where the gradient is not good."""

    def update(grads: tree.Tree, state: Any, params: tree.Tree, rate: Tensor, good: Tensor) -> tuple[tree.Tree, Any]:
        updates, after = transform.update(grads, state, params)
        moved = tree.map(lambda p, u: torch.where(good, p - u * rate.to(p.dtype), p), params, updates)
        return moved, tree.map(lambda new, old: torch.where(good, new, old), after, state)

    return Optimizer(transform.init, update)


def clip(grads: tree.Tree, norm: Tensor, limit: float) -> tree.Tree:
    """Scale gradients so that their global norm, given, is at most ``limit``; 0 means no limit."""
    if limit == 0.0:
        return grads
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    return tree.map(lambda g: g * factor.to(g.dtype), grads)


def sum_of_squares(grads: list[Tensor], copies: list[int]) -> Tensor:
    """Sum the squares of local gradients, each divided by how many devices hold the same part."""
    return tree.total(g.to(wide(g.dtype)).square().sum() / n for g, n in zip(grads, copies, strict=True))


def squares_of_many(grads: list[Tensor]) -> Tensor:
    """Sum the squares of many tensors of one type, without a kernel for each."""
    norms: list[Tensor] = _foreach_norm(grads, 2.0, wide(grads[0].dtype))
    return torch.stack(norms).square().sum()
