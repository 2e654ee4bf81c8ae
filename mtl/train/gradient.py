"""Gradients of a step: of each micro-batch, accumulated, then summed over the devices that hold the same parameter."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from mtl import tree
from mtl.ops.linear import gather_step, scatter_step
from mtl.optim.transforms import sum_of_squares
from mtl.runtime.compile import compiled
from mtl.sharding.collectives import psum
from mtl.sharding.layout import missing_axes
from mtl.sharding.parallel import Parallel
from mtl.train.loss import Batch, Loss

LEAST = 2**24
"""Parameters of a layer, on one device, from which on its gradients stay apart: the update is called once a layer then, which takes the
host half a millisecond."""

Gradient = Callable[[tree.Tree, Batch, Tensor], tuple[tree.Tree, Tensor]]


def value_and_grad(
    loss: Loss, how: str, backend: Any, options: Any = None, rest: torch.dtype | None = None, stays: tree.Tree | None = None
) -> Gradient:
    """Make ``gradient(params, batch, scale)``: gradients of scale times the loss, and this device's shares of
    the summed (loss, cross-entropy).

    ``how`` is none (torch.func, eager), step (torch.func in one compiled graph) or block (autograd over compiled blocks). Parameters that
    come in a narrower type than the one they ``rest`` in are widened first: no value changes, and gradients are those of the type at rest.
    In one graph, gradients of layers for which ``stays`` is true come as lists, an entry a layer; all others are stacked.
    """

    def widened(params: Any) -> Any:
        return params if rest is None else tree.map(lambda p: p.to(rest), params)

    def scaled(params: Any, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor]:
        # By way of the tokens' weights gradients are made to scale: times the loss, those that the head has finished are written again.
        value, entropy = loss(params, {**batch, "weights": batch["weights"] * scale.to(batch["weights"].dtype)})
        return value, torch.stack([value, entropy]).detach() / scale.to(value.dtype)

    def functional(params: Any, batch: Batch, scale: Tensor) -> tuple[Any, Tensor]:
        grads, (_, shares) = grad_and_value(scaled, has_aux=True)(widened(params), batch, scale)
        return grads, shares

    def autograd(params: Any, batch: Batch, scale: Tensor) -> tuple[Any, Tensor]:
        leaves, structure = tree.flatten(widened(params))
        leaves = [x.detach().requires_grad_() for x in leaves]
        with torch.enable_grad():
            value, shares = scaled(tree.unflatten(structure, leaves), batch, scale)
        return tree.unflatten(structure, torch.autograd.grad(value, leaves)), shares

    def functional_apart(params: Any, batch: Batch, scale: Tensor) -> tuple[Any, Tensor]:
        grads, shares = functional(params, batch, scale)
        return together(grads, stays), shares

    def like(params: Any, batch: Batch, scale: Tensor) -> tuple[Any, Tensor]:
        """Give the shapes without going backward: gradients are like their parameters."""
        whole = widened(params)
        grads = tree.map(lambda p: torch.empty_like(p, memory_format=torch.contiguous_format), whole)
        return together(grads, stays), scaled(whole, batch, scale)[1]

    if how == "block":
        return autograd
    if how == "none":
        return functional
    run = compiled(functional_apart, backend, options=options, like=like)

    def gradient(params: Any, batch: Batch, scale: Tensor) -> tuple[Any, Tensor]:
        beside = {name: apart(batch[name]) for name in ("frozen", "scales") if name in batch}
        return run(apart(params), {**batch, **beside}, scale)

    return gradient


def apart(params: tree.Tree) -> tree.Tree:
    """Give a compiled step every layer's tensors as inputs of their own.

    Read out of stacked ones, each layer had kernels of its own, which differ in a place alone and are each compiled, tried out and loaded
    (192 of 225 for 32 layers); and inductor compared every layer's with every other's, since all read the same array.
    """
    return {name: tree.unstack(part) if name == "layers" and tree.leaves(part) else part for name, part in params.items()}


def together(params: tree.Tree, stays: tree.Tree | None = None) -> tree.Tree:
    """Undo `apart`; of what ``stays`` says, give lists."""

    def one(stay: bool, *layers: Tensor) -> Any:
        return list(layers) if stay else torch.stack(layers)

    if stays is None:
        return {name: tree.stack(part) if isinstance(part, list) else part for name, part in params.items()}
    return {name: tree.map(one, stays, *part) if isinstance(part, list) else part for name, part in params.items()}


def stay_apart(par: Parallel, specs: tree.Tree) -> tree.Tree | None:
    """Say which layers' gradients need no sum over devices and so no stack; None where there are none, or where stacks cost less."""
    if par.rules.gather == "step" or not tree.leaves(specs.get("layers")):
        return None
    layouts = tree.map(lambda spec: par.layout(spec.axes, "store"), specs["layers"])
    found = tree.map(lambda layout: not missing_axes(layout, par.mesh), layouts)
    rows = zip(tree.leaves(specs["layers"]), tree.leaves(layouts), tree.leaves(found), strict=True)
    sizes = [math.prod(spec.shape[1:]) // par.mesh.size(layout.used()) for spec, layout, alone in rows if alone]
    return found if sizes and sum(sizes) >= LEAST else None


def gather_weights(par: Parallel, letters: tree.Tree, params: tree.Tree, dtype: torch.dtype) -> tree.Tree:
    """Bring all parameters to what the loss takes: whole and in the compute type where the rules gather once a step, else as they are."""
    if par.rules.gather != "step":
        return params
    return tree.map(lambda axes, p: gather_step(par, axes, p, dtype), letters, params)


def accumulate(
    gradient: Gradient, params: tree.Tree, batch: Batch, scale: Tensor, reduce: torch.dtype, under_way: Callable[[], None] = lambda: None
) -> tuple[tree.Tree, Tensor]:
    """Sum the gradients of the micro-batches (first axis of the batch's per-sample arrays); give the shares [A, 2] of each too.

    ``under_way`` is called when the device has been given the first micro-batch.
    """
    shared = {"slots", "key", "frozen", "scales"}
    shares: list[Tensor] = []
    total: Any = None
    for i in range(batch["tokens"].shape[0]):
        grads, share = gradient(params, {k: v if k in shared else v[i] for k, v in batch.items()}, scale)
        shares.append(share)
        if total is None:
            under_way()
            total = tree.map(lambda g: g.to(torch.promote_types(g.dtype, reduce)), grads) if batch["tokens"].shape[0] > 1 else grads
        else:
            _add(total, grads)
        del grads  # else they would live beside the next micro-batch's
    return total, torch.stack(shares)


def _add(total: tree.Tree, grads: tree.Tree) -> None:
    for t, g in zip(tree.leaves(total), tree.leaves(grads), strict=True):
        t.add_(g)


def reduce_gradients(par: Parallel, letters: tree.Tree, grads: tree.Tree, params: tree.Tree) -> tree.Tree:
    """Apply the one rule: a parameter's gradient is the local one, summed over every mesh axis on which the parameter is replicated."""

    def one(axes: str, grad: Tensor, p: Tensor) -> Tensor:
        if par.rules.gather == "step":
            grad = scatter_step(par, axes, grad, p)
        return psum(grad.to(p.dtype), missing_axes(par.layout(axes, "store"), par.mesh), par.mesh)

    return tree.map(one, letters, grads, params)


def global_norm(par: Parallel, letters: tree.Tree, grads: tree.Tree, beside: Sequence[Tensor] = ()) -> Tensor:
    """Give the norm of all gradients over the whole mesh, the same bits on every device; ``beside`` are sums of squares of others."""
    copies = [par.mesh.size(missing_axes(par.layout(axes, "store"), par.mesh)) for axes in tree.leaves(letters)]
    squares = [sum_of_squares(tree.leaves(grads), copies)] if copies else []
    return psum(tree.total([*squares, *beside]), par.mesh.shape.active(), par.mesh).sqrt()
