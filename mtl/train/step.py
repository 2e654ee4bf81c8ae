"""The training step: one pure function from (state, batch) to (state, metrics)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtl import random, tree
from mtl.errors import UserError, unknown
from mtl.ops.scales import weight_scales
from mtl.optim.schedules import Schedule
from mtl.optim.transforms import Optimizer, clip, squares_of_many
from mtl.precision import Precision
from mtl.runtime.compile import compiled, inductor_options, update_options
from mtl.sharding.collectives import psum
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train import offload
from mtl.train.gradient import accumulate, gather_weights, global_norm, reduce_gradients, stay_apart, value_and_grad
from mtl.train.loss import Batch, Model, Remat, make_loss, parse_remat
from mtl.train.parts import Parts, count_layers, stacked
from mtl.train.state import TrainState, next_scale

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepOptions:
    """How a step runs. remat, offload, compile, backend and overlap change its speed and memory alone.

    ``offload`` (none, activations, optimizer or both) says what is kept in host memory.

    ``under_way`` is called once a step, when the gradient of the first micro-batch is; ``before_update`` before the state is written to.
    """

    precision: Precision
    remat: str = "none"
    compile: str = "none"
    backend: Any = "inductor"
    clip: float = 1.0
    seed: int = 0
    overlap: bool = True
    offload: str = "none"
    before_update: Callable[[], None] = field(default=lambda: None, repr=False)
    under_way: Callable[[], None] = field(default=lambda: None, repr=False)

    def __post_init__(self) -> None:
        """Refuse an unknown way to compile."""
        if self.compile not in ("none", "block", "step"):
            raise unknown("--compile", self.compile, ("none", "block", "step"))
        offload.check(self.offload)
        if offload.activations(self.offload) and self.compile == "block":
            raise UserError("--offload activations needs --compile step or none: a layer compiled alone keeps its input on the device.")

    def again(self) -> Remat:
        """Say what is computed again in backward, and where it waits."""
        return parse_remat(self.remat, offload.activations(self.offload))


def make_step(
    model: Model, config: Any, par: Parallel, optimizer: Optimizer, schedule: Schedule, options: StepOptions, weights: Any = None
) -> Step:
    """Make the step. The state it is given is written in place (donated); metrics are device scalars, and nothing waits for the device.

    Where loss or gradient norm are not finite the state stays, and the metrics say so. Steps of several lengths share ``weights``.
    """
    loss = make_loss(model, config, par, options.precision, options.again(), options.backend if options.compile == "block" else None)
    settings = inductor_options(options.backend, par.mesh.device_type, options.overlap)
    specs = model.specs(config)
    weights = weights or offload.weights(specs, options.precision, par, options.offload)
    rest = options.precision.param if weights is not None and par.rules.gather != "step" else None
    letters, projections = tree.map(lambda spec: spec.axes, specs), model.projections(config)
    stays = stay_apart(par, specs) if options.compile == "step" and not options.precision.scaled else None
    gradient = value_and_grad(loss, options.compile, options.backend, settings, rest, stays)
    update = make_whole_update(par, letters, optimizer, schedule, options, weights, stays)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        local = tree.map(to_local, state)
        with torch.no_grad():
            scale, count = loss_scale(par, local, batch)
            key = random.bits(random.key("dropout", options.seed), local.step)
            held = gather_weights(par, letters, weights(local.params) if weights else local.params, options.precision.compute)
            scales = weight_scales(par, projections, tree.join(batch.get("frozen"), held)["layers"], options.precision.compute)
            grads, shares = accumulate(gradient, held, {**batch, "key": key, "scales": scales}, scale, par.reduce, options.under_way)
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


def make_whole_update(
    par: Parallel, letters: tree.Tree, optimizer: Optimizer, schedule: Schedule, options: StepOptions, weights: offload.Weights | None,
    stays: tree.Tree | None,
) -> Any:  # fmt: skip
    """Make the compiled second half of a step.

    It goes part by part where layers' gradients stay apart, and where the state streams (with ``weights``, those that the device holds).
    """
    if weights is None and stays is None:
        return compile_update(make_update(par, letters, optimizer, schedule, options), optimizer, options)
    lone = tree.leaves(tree.join(tree.map(lambda _: False, letters), {} if stays is None else {"layers": stays}))
    summed = [axes for axes, alone in zip(tree.leaves(letters), lone, strict=True) if not alone]
    measure, apply = make_measure(par, summed, schedule, options), make_apply(optimizer, options)
    if options.compile != "none":
        measure = compiled(measure, options.backend, options=update_options(options.backend))
    apply = compile_update(make_apply_in_place(apply) if weights is None else apply, optimizer, options)
    return make_update_in_parts(letters, measure, apply, lone, weights)


def make_update(par: Parallel, letters: tree.Tree, optimizer: Optimizer, schedule: Schedule, options: StepOptions) -> Any:
    """Make the second half of a step: from local gradients to the new state, written in place."""
    measure, apply = make_measure(par, letters, schedule, options), make_apply(optimizer, options)

    def update(state: TrainState, grads: tree.Tree, shares: Tensor, scale: Tensor, count: Tensor) -> dict[str, Tensor]:
        grads, found, after = measure(state, grads, shares, scale, count)
        params, opt_state = apply(state.params, state.opt_state["optimizer"], grads, found)
        write(state, TrainState(after[0], params, {"optimizer": opt_state, **after[1]}))
        return found

    return update


def make_measure(par: Parallel, letters: tree.Tree, schedule: Schedule, options: StepOptions) -> Any:
    """Make what comes before an update: gradients summed over devices, what a step tells, and (step, loss scale) after it.

    ``beside`` are sums of squares of gradients that are in no need of that.
    """

    def measure(state: TrainState, grads: tree.Tree, shares: Tensor, scale: Tensor, count: Tensor, beside: Sequence[Tensor] = ()) -> Any:
        grads = reduce_gradients(par, letters, grads, state.params)
        grads = tree.map(lambda g: g / scale.to(g.dtype), grads) if options.precision.scaled else grads
        losses = psum(shares, par.mesh.shape.active(), par.mesh) / count
        norm = global_norm(par, letters, grads, beside)
        good = torch.isfinite(norm) & torch.isfinite(losses).all()
        metrics: dict[str, Tensor] = {
            "loss": losses[:, 0].sum(),
            "entropy": losses[:, 1].sum(),
            "losses": losses[:, 0],
            "grad_norm": norm,
            "tokens": count,
            "learning_rate": schedule(state.step),
            "good": good,
        }
        scaling: dict[str, Any] = {}
        if options.precision.scaled:
            scaling["loss_scale"] = next_scale(state.opt_state["loss_scale"], good)
            metrics["loss_scale"] = scaling["loss_scale"]["scale"].clone()
        taken = torch.ones_like(state.step) if options.precision.scaled else good.to(state.step.dtype)
        return grads, metrics, (state.step + taken, scaling)

    return measure


def make_apply(optimizer: Optimizer, options: StepOptions) -> Any:
    """Make the update itself: new parameters and optimizer state, from measured gradients."""

    def apply(params: tree.Tree, held: Any, grads: tree.Tree, found: Any) -> Any:
        grads = tree.map(lambda g, p: g.to(p.dtype), grads, params)
        return optimizer.update(clip(grads, found["grad_norm"], options.clip), held, params, found["learning_rate"], found["good"])

    return apply


def make_update_in_parts(letters: tree.Tree, measure: Any, apply: Any, lone: list[bool], weights: offload.Weights | None) -> Any:
    """Make an update that takes a layer's share of all at a time. Of parameters that are ``lone``, gradients come as lists of layers'."""

    def update(state: TrainState, grads: tree.Tree, shares: Tensor, scale: Tensor, count: Tensor) -> dict[str, Tensor]:
        params, given = tree.leaves_like(letters, state.params), tree.leaves_like(letters, grads)
        apart = [g for each, alone in zip(given, lone, strict=True) if alone for g in each]
        # Tensors on the host tell `measure` their shapes and types alone.
        shapes = [p.new_empty((), device=shares.device).expand(p.shape) for p, alone in zip(params, lone, strict=True) if not alone]
        small = {name: x for name, x in state.opt_state.items() if name != "optimizer"}
        others = [g for g, alone in zip(given, lone, strict=True) if not alone]
        others, metrics, (step, scaling) = measure(
            TrainState(state.step, shapes, small), others, shares, scale, count, [squares_of_many(apart)] if apart else []
        )
        left = iter(others)
        grads = tree.unflatten(tree.flatten(letters)[1], [g if alone else next(left) for g, alone in zip(given, lone, strict=True)])
        needed = {name: metrics[name] for name in ("grad_norm", "learning_rate", "good")}
        if weights is None:
            apply_by_layer(apply, state, grads, needed)
        else:
            offload.stream(apply, state, grads, weights, needed, any(lone))
            weights.settled(state.params)
        write((state.step, {name: state.opt_state[name] for name in scaling}), (step, scaling))
        return metrics

    return update


def make_apply_in_place(apply: Any) -> Any:
    """Let the update of a part write into what it is given, but for scalars, which all parts share: it gives those."""

    def apply_in_place(params: tree.Tree, held: Any, grads: tree.Tree, found: Any) -> list[Tensor]:
        old, new = tree.leaves((params, held)), tree.leaves(apply(params, held, grads, found))
        write([x for x in old if x.dim()], [x for x in new if x.dim()])
        return [x for x in new if not x.dim()]

    return apply_in_place


def apply_by_layer(apply_in_place: Any, state: TrainState, grads: tree.Tree, scalars: Any) -> None:
    """Update a state, a layer of every stacked array and a share of every other at a time."""
    held, structure = tree.flatten((state.params, state.opt_state["optimizer"]))
    parts = Parts(count_layers(state.params))
    layered = stacked((state.params, state.opt_state["optimizer"]), parts.layers)
    given, of_params = tree.leaves_like(state.params, grads), tree.flatten(state.params)[1]
    after: list[Tensor] = []
    for c in range(parts.count):
        now = [parts.take(x, by_layer, c) if x.dim() else x for x, by_layer in zip(held, layered, strict=True)]
        part = [parts.take(g, by_layer, c) for g, by_layer in zip(given, layered, strict=False)]  # parameters come first
        after = apply_in_place(*tree.unflatten(structure, now), tree.unflatten(of_params, part), scalars)
    write([x for x in held if not x.dim()], after)


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
