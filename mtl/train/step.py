"""The training step: one pure function from (state, batch) to (state, metrics)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtl import random, tree
from mtl.errors import unknown
from mtl.optim.schedules import Schedule
from mtl.optim.transforms import Optimizer, clip
from mtl.precision import Precision
from mtl.runtime.compile import compiled, inductor_options, update_options
from mtl.sharding.collectives import psum
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train.gradient import accumulate, gather_weights, global_norm, reduce_gradients, value_and_grad
from mtl.train.loss import Batch, Model, make_loss, parse_remat
from mtl.train.state import TrainState, next_scale

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepOptions:
    """How a step runs. remat, compile, backend and overlap change its speed and memory alone.

    ``before_update`` is called once a step, before the state is written to.
    """

    precision: Precision
    remat: str = "none"
    compile: str = "none"
    backend: Any = "inductor"
    clip: float = 1.0
    seed: int = 0
    overlap: bool = True
    before_update: Callable[[], None] = field(default=lambda: None, repr=False)

    def __post_init__(self) -> None:
        """Refuse an unknown way to compile."""
        if self.compile not in ("none", "block", "step"):
            raise unknown("compile", self.compile, ("none", "block", "step"))


def make_step(model: Model, config: Any, par: Parallel, optimizer: Optimizer, schedule: Schedule, options: StepOptions) -> Step:
    """Make the step. The state it is given is written in place (donated); metrics are device scalars, and nothing waits for the device.

    Where the loss or the gradient norm is not finite, the state stays as it was, and the metrics say so.
    """
    blocks = options.backend if options.compile == "block" else None
    loss = make_loss(model, config, par, options.precision, parse_remat(options.remat), blocks)
    settings = inductor_options(options.backend, par.mesh.shape.devices(), par.mesh.device_type, options.overlap)
    gradient = value_and_grad(loss, options.compile, options.backend, settings)
    letters = tree.map(lambda spec: spec.axes, model.specs(config))
    finish = make_update(par, letters, optimizer, schedule, options)
    update = compile_update(finish, optimizer, options)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        local = tree.map(to_local, state)
        with torch.no_grad():
            scale, count = loss_scale(par, local, batch)
            key = random.bits(random.key("dropout", options.seed), local.step)
            weights = gather_weights(par, letters, local.params, options.precision.compute)
            grads, shares = accumulate(gradient, weights, {**batch, "key": key}, scale, par.reduce)
            options.before_update()
            metrics = update(local, grads, shares, scale * count, count)
        return state, metrics

    return train_step


def loss_scale(par: Parallel, state: TrainState, batch: Batch) -> tuple[Tensor, Tensor]:
    """Give (factor on the summed loss, sum of the global batch's target weights): the factor is 1 / sum, times fp16's loss scale."""
    count = psum(batch["weights"].sum(), par.layout("BS").used(), par.mesh)
    count = torch.where(count > 0, count, torch.ones_like(count))  # a batch without targets: its loss is 0, not 0 / 0
    scale = state.opt_state["loss_scale"]["scale"] if "loss_scale" in state.opt_state else torch.ones_like(count)
    return scale.to(count.dtype) / count, count


def make_update(par: Parallel, letters: tree.Tree, optimizer: Optimizer, schedule: Schedule, options: StepOptions) -> Any:
    """Make the second half of a step: from local gradients to the new state, written in place."""

    def update(state: TrainState, grads: tree.Tree, shares: Tensor, scale: Tensor, count: Tensor) -> dict[str, Tensor]:
        grads = reduce_gradients(par, letters, grads, state.params)
        grads = tree.map(lambda g: g / scale.to(g.dtype), grads) if options.precision.scaled else grads
        losses = psum(shares, par.mesh.shape.active(), par.mesh) / count
        norm = global_norm(par, letters, grads)
        good = torch.isfinite(norm) & torch.isfinite(losses).all()
        rate = schedule(state.step)
        held = state.opt_state["optimizer"]
        params, opt_state = optimizer.update(clip(grads, norm, options.clip), held, state.params, rate, good)
        after: dict[str, Any] = {"optimizer": opt_state}
        if options.precision.scaled:
            after["loss_scale"] = next_scale(state.opt_state["loss_scale"], good)
        metrics: dict[str, Tensor] = {
            "loss": losses[:, 0].sum(),
            "entropy": losses[:, 1].sum(),
            "losses": losses[:, 0],
            "grad_norm": norm,
            "tokens": count,
        }
        metrics |= {"learning_rate": rate, "good": good}
        if options.precision.scaled:
            metrics["loss_scale"] = after["loss_scale"]["scale"].clone()
        taken = torch.ones_like(state.step) if options.precision.scaled else good.to(state.step.dtype)
        write(state, TrainState(state.step + taken, params, after))
        return metrics

    return update


def compile_update(update: Any, optimizer: Optimizer, options: StepOptions) -> Any:
    """Compile what `make_update` made, where the run compiles and the optimizer can be."""
    if options.compile == "none" or not optimizer.compiles:
        return update
    return compiled(update, options.backend, options=update_options(options.backend))


def write(old: tree.Tree, new: tree.Tree) -> None:
    """Write a state's new values into its old memory."""
    for a, b in zip(tree.leaves(old), tree.leaves(new), strict=True):
        if a is not b:
            a.copy_(b)
