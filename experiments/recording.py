"""What a run's step does, recorded on tensors without memory: the run's own loss, gradient and update, seen from one device of its mesh."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mtl import params, tree
from mtl.inspect.mesh import planned_mesh
from mtl.inspect.plan import Records
from mtl.inspect.record import Recorder, Trace
from mtl.kernels import copy_engine
from mtl.models import decoder
from mtl.ops.scales import weight_scales
from mtl.optim.schedules import Schedule
from mtl.optim.transforms import Optimizer
from mtl.params import layouts
from mtl.sharding.layout import box
from mtl.sharding.mesh import MeshShape
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules
from mtl.train import offload
from mtl.train.gradient import gather_weights, value_and_grad
from mtl.train.loss import make_loss
from mtl.train.state import TrainState
from mtl.train.step import StepOptions, loss_scale, make_update


@dataclass(frozen=True)
class Job:
    """One training step on one mesh: what a plan is made for. ``sizes`` are those of `Parallel`; ``kind`` is cpu, or meta for a GPU."""

    config: decoder.Config
    rules: Rules
    mesh: MeshShape
    sizes: Mapping[str, int]
    options: StepOptions
    optimizer: Optimizer
    schedule: Schedule
    micro_batches: int
    kind: str = "meta"
    documents: bool = False
    """Whether rows hold several documents that attention keeps apart."""
    engine: bool = False
    """Whether copy engines move weights and gradients."""

    def parallel(self, device: int = 0) -> Parallel:
        """Stand on one device of the mesh."""
        mesh, precision = planned_mesh(self.mesh, device, self.kind), self.options.precision
        return Parallel(mesh, self.rules, self.sizes, precision.reduce, engine=self.engine, fp8=precision.fp8)

    def rows(self) -> int:
        """Count the samples that a device takes through the model at once."""
        return self.sizes["batch"] // math.prod(getattr(self.mesh, axis) for axis in self.rules.act["batch"])


class Watched:
    """A model whose parts say in a record where they are."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.calls = recorder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(decoder, name)

    def embed(self, *args: Any) -> Any:
        """Embed, as the model does."""
        with self.recorder.scoped("embed"):
            return decoder.embed(*args)

    def block(self, *args: Any, **kwargs: Any) -> Any:
        """Apply a layer; where backward asks for it, it is computed again."""
        self.calls += 1
        scope = "block" if self.recorder.scope != "backward" else "again"
        with self.recorder.scoped(scope, self.calls - 1):
            return decoder.block(*args, **kwargs)

    def head(self, *args: Any) -> Any:
        """Take the loss, as the model does."""
        with self.recorder.scoped("head"):
            return decoder.head(*args)


def record(job: Job, device: int = 0) -> Records:
    """Record a step as one device runs it. Layers repeat, so two short models tell what any number of layers does."""
    layers = job.config.layers
    period = 2 * repeat(job)  # a compiler may treat every other layer alike
    first = (layers - 1) % period + 1
    first = min(layers, first + period) if first == 1 else first
    rounds = (layers - first) // period
    few = record_gradient(job, first, device)
    more = record_gradient(job, first + period, device) if rounds else few
    par, precision = job.parallel(device), job.options.precision
    held: dict[str, int] = {}
    with world(job.kind) as make:
        state, batch = local_state(job, par, make), local_batch(job, par, make)
        rest = {"weights": nbytes(state.params), "optimizer": nbytes(state.opt_state), "batch": job.micro_batches * nbytes(batch)}
        grads = local_params(job, job.config, par, "store", make)
        if par.rules.gather == "step":
            grads = local_params(job, job.config, par, "compute", make)
            held["gathered weights"] = nbytes(grads)
        host, streamed = 0, 0
        if offload.optimizer_state(job.options.offload):
            moments = [x for x in tree.leaves(state.opt_state["optimizer"]) if x.dim()]
            rest["weights"], whole = nbytes(in_use(job, job.config, state.params, make)), rest["weights"]
            rest["optimizer"] -= nbytes(moments)
            away = zip(tree.leaves(decoder.specs(job.config)), tree.leaves(state.params), strict=True)
            host = nbytes(moments) + sum(nbytes(p) for spec, p in away if offload.leaves_device(spec, precision))
            streamed = 4 * (whole + nbytes(moments)) // offload.parts(state.params, False).count  # two parts come, two leave
        summed = nbytes(tree.map(lambda g: make(g.shape, torch.promote_types(g.dtype, par.reduce)), grads))
    if job.engine:
        rest["transfer slots"] = copy_engine.room(slots(few, more))
    return Records(
        record_gather(job, device), few, more, rounds, record_update(job, device), job.micro_batches, job.options.compile,
        job.kind != "cpu", job.mesh, str(precision.compute).removeprefix("torch."), rest, held, summed, host, streamed,
    )  # fmt: skip


def slots(*traces: Trace) -> list[tuple[str, str, int]]:
    """List what the copy engines move: the kind of slot each transfer takes, its group and its bytes."""
    wires = [op.wire for trace in traces for op in trace.ops if op.wire is not None]
    return [(wire.slot[0], "+".join(wire.axes), wire.slot[1]) for wire in wires if wire.slot is not None]


def repeat(job: Job) -> int:
    """Find after how many layers they repeat: by what is computed again, and by what each layer's attention sees."""
    layers, every = job.config.layers, job.options.again().every
    kinds = [(decoder.at_layer(job.config, i).window, i % every == 0) for i in range(layers)]
    return next(p for p in range(1, layers + 1) if all(kinds[i] == kinds[i + p] for i in range(layers - p)))


def nbytes(values: Any) -> int:
    """Sum the bytes of a tree of tensors."""
    return sum(x.numel() * x.element_size() for x in tree.leaves(values) if isinstance(x, torch.Tensor))


def record_gradient(job: Job, layers: int, device: int = 0) -> Trace:
    """Record the gradient of one micro-batch for a model of so many layers."""
    par, precision = job.parallel(device), job.options.precision
    config = dataclasses.replace(job.config, layers=layers, full_layers=tuple(i for i in job.config.full_layers if i < layers))
    par = dataclasses.replace(par, sizes={**par.sizes, "layers": layers})
    recorder = Recorder(job.options.compile != "none")
    model: Any = Watched(recorder)
    with world(job.kind) as make:
        loss = make_loss(model, config, par, precision, job.options.again())

        def watched(weights: Any, batch: Any) -> Any:
            out = loss(weights, batch)
            recorder.scope = "backward"
            return out

        each = par.rules.gather == "step"
        weights = in_use(job, config, local_params(job, config, par, "compute" if each else "store", make), make)
        batch: dict[str, Any] = local_batch(job, par, make)
        batch["scales"] = weight_scales(par, decoder.projections(config), weights["layers"], precision.compute)
        scale = make((), precision.param)
        gradient = value_and_grad(
            watched, "block" if job.options.compile == "block" else "none", None, rest=None if each else precision.param
        )
        with recorder:
            recorder.label("weights", weights)
            recorder.label("batch", {**batch, "scale": scale})
            grads, shares = gradient(weights, batch, scale)
            recorder.label("gradients", grads, outputs=True)
            recorder.label("shares", shares, outputs=True)
            recorder.sweep()
    return recorder.trace


def record_gather(job: Job, device: int = 0) -> Trace:
    """Record what happens once a step before the gradients: weights that the rules gather whole, and the count of tokens."""
    par, precision = job.parallel(device), job.options.precision
    letters = tree.map(lambda s: s.axes, decoder.specs(job.config))
    recorder = Recorder()
    with world(job.kind) as make, torch.no_grad():
        state, batch = local_state(job, par, make), local_batch(job, par, make)
        with recorder:
            recorder.label("params", state.params)
            loss_scale(par, state, batch)
            weights = gather_weights(par, letters, state.params, precision.compute)
            recorder.label("weights", weights, outputs=True)
            scales = weight_scales(par, decoder.projections(job.config), weights["layers"], precision.compute)
            recorder.label("scales", scales, outputs=True)
            recorder.sweep()
    return recorder.trace


def record_update(job: Job, device: int = 0) -> Trace:
    """Record the second half of a step: gradients summed over devices, clipped, and the state written."""
    par, precision = job.parallel(device), job.options.precision
    specs = decoder.specs(job.config)
    letters = tree.map(lambda s: s.axes, specs)
    recorder = Recorder()
    with world(job.kind) as make, torch.no_grad():
        state = local_state(job, par, make)
        whole = par.rules.gather == "step"
        grads = local_params(job, job.config, par, "compute" if whole else "store", make)
        if job.micro_batches > 1:
            grads = tree.map(lambda g: g.to(torch.promote_types(g.dtype, par.reduce)), grads)
        update = make_update(par, letters, job.optimizer, job.schedule, job.options)
        with recorder:
            recorder.label("params", state.params)
            recorder.label("optimizer", state.opt_state)
            recorder.label("gradients", grads)
            metrics = update(
                state, grads, make((job.micro_batches, 2), precision.param), make((), precision.param), make((), precision.param)
            )
            recorder.label("metrics", metrics, outputs=True)
            recorder.label("state", state, outputs=True)
            del grads
            recorder.sweep()
    return recorder.trace


def local_params(job: Job, config: decoder.Config, par: Parallel, table: str, make: Any) -> Any:
    """Make one device's parameters, at rest or gathered for the step, without memory."""
    specs, precision = decoder.specs(config), job.options.precision
    dtype = precision.param if table == "store" else precision.compute

    def one(spec: params.ParamSpec, layout: Any) -> Any:
        shape = box(spec.shape, layout, par.mesh)[1]
        return make(shape, dtype)

    return tree.map(one, specs, layouts(specs, job.rules, job.mesh, table))


def in_use(job: Job, config: decoder.Config, weights: Any, make: Any) -> Any:
    """Give weights at rest in the types that the loss takes them in, without memory: masters in host memory leave narrower ones."""
    precision = job.options.precision
    if not offload.optimizer_state(job.options.offload):
        return weights
    return tree.map(
        lambda spec, p: make(p.shape, precision.compute) if offload.leaves_device(spec, precision) else p, decoder.specs(config), weights
    )


def local_state(job: Job, par: Parallel, make: Any) -> TrainState:
    """Make one device's train state without memory."""
    held = local_params(job, job.config, par, "store", make)
    opt_state: dict[str, Any] = {"optimizer": job.optimizer.init(held)}
    if job.options.precision.scaled:
        opt_state["loss_scale"] = {"scale": make((), torch.float32), "good_steps": make((), torch.float32)}
    return TrainState(make((), torch.int64), held, opt_state)


def local_batch(job: Job, par: Parallel, make: Any) -> dict[str, Any]:
    """Make one device's micro-batch without memory."""
    rows = job.rows()
    seq = job.sizes["seq"] // par.mesh.size(par.axes("S"))
    batch = {name: make((rows, seq), torch.int64) for name in ("tokens", "targets", "positions")}
    batch["weights"] = make((rows, seq), job.options.precision.param)
    if job.documents:
        batch["documents"] = make((rows, 8), torch.int32)
    return {**batch, "rows": make((rows,), torch.int64), "slots": make((seq,), torch.int64), "key": make((), torch.int64)}


@contextlib.contextmanager
def world(kind: str) -> Any:
    """Give what makes tensors without memory: fake ones where the plan is for a CPU, so that its own kernels are chosen, else meta."""

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=kind)

    with FakeTensorMode() if kind == "cpu" else contextlib.nullcontext():
        yield make
