"""Steps and evaluation through a pipeline: the same state, numbers and metrics as without one."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mtl import random, tree
from mtl.axes import LETTERS
from mtl.ops.linear import gather_step, scatter_step
from mtl.optim.schedules import Schedule
from mtl.optim.transforms import Optimizer
from mtl.params import decayed
from mtl.pipeline.exchange import Move, plan, stage_parallel
from mtl.pipeline.links import Links
from mtl.pipeline.run import run, warm_up
from mtl.pipeline.schedules import forwards
from mtl.pipeline.simulate import Span
from mtl.pipeline.stage import Form, Forward, Functions, Pieces, Training, micro_batch, trace_pieces
from mtl.pipeline.table import Action, Table
from mtl.precision import Precision
from mtl.runtime.compile import compiled, inductor_options
from mtl.sharding.collectives import psum
from mtl.sharding.layout import box
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train.frozen import Held
from mtl.train.loss import Batch, Model, Remat, make_blocks, parse_remat
from mtl.train.state import TrainState
from mtl.train.step import StepOptions, compile_update, loss_scale, make_update


@dataclass(frozen=True)
class Pipeline:
    """A run's pipeline: its table for a number of micro-batches, and the layers of each stage."""

    table: Callable[[int], Table]
    layers: tuple[tuple[int, ...], ...]
    place: Mapping[int, int]


@dataclass(eq=False)
class Staging:
    """Which parameters the stages of each device use, and how these get there and back.

    ``trained`` is the model as it is trained, where some of its parameters stay as they are.
    """

    model: Model
    config: Any
    par: Parallel
    precision: Precision
    pipeline: Pipeline
    trained: Model | None = None
    _moves: dict[str, Move | None] = field(default_factory=dict[str, Move | None])

    def __post_init__(self) -> None:
        """Take down what follows from the settings."""
        self.inner = stage_parallel(self.par)
        self.device = self.par.mesh.coordinates["pipe"]
        self.specs = self.model.specs(self.config)
        self.letters = dict(tree.paths(tree.map(lambda spec: spec.axes, self.specs)))
        learning = {path for path, _ in tree.paths((self.trained or self.model).specs(self.config))}
        self.learning = tree.map_paths(lambda path, _: path in learning, self.specs)
        self.own = [s for s, d in self.pipeline.place.items() if d == self.device]
        self.types = tree.map(self._type, self.specs, decayed(self.specs))
        self.traced: dict[Any, Pieces] = {}

    def _type(self, spec: Any, matrix: bool) -> torch.dtype:
        """Say in which type a parameter goes to its stage: a matrix that is not gathered layer by layer is cast once a step."""
        whole = self.inner.layout(spec.axes, "store") == self.inner.layout(spec.axes, "compute")
        return self.precision.compute if self.par.rules.gather == "step" or (matrix and whole) else self.precision.param

    def functions(self, again: Remat) -> Functions:
        """Give the model's functions on a stage's devices."""
        model, config, inner, compute = self.model, self.config, self.inner, self.precision.compute
        return Functions(
            lambda params, batch: model.embed(config, inner, params, batch, compute)[0],
            lambda layer: (model.at_layer(config, layer), layer % again.every == 0),
            lambda kind: make_blocks(model, kind[0], inner, again)[kind[1]],
            lambda params, x, batch: model.head(config, inner, params, x, batch),
            lambda batch: model.beside(config, inner, batch),
            model.layer_key,
        )

    def pieces(self, functions: Functions, batch: Batch, compile: Any = None, layers: bool = True) -> Pieces:
        """Trace the model, once for each shape of micro-batches; without ``layers`` its embedding and head alone."""
        known = tuple((name, tuple(x.shape)) for name, x in micro_batch(batch, 0).items())
        if known not in self.traced:
            table = "compute" if self.par.rules.gather == "step" else "store"

            def form(spec: Any, dtype: torch.dtype, trained: bool) -> Form:
                shape = box(spec.shape, self.inner.layout(spec.axes, table), self.inner.mesh)[1]
                return Form(shape[1:] if LETTERS[spec.axes[0]] == "layers" else shape, dtype, trained)

            forms = tree.map(form, self.specs, self.types, self.learning)
            outer = {name: part for name, part in forms.items() if name != "layers"}
            kinds = self._kinds(functions) if layers else ()
            self.traced[known] = trace_pieces(functions, kinds, forms["layers"], outer, batch, compile)
        if not self._moves:
            self._plan(self.traced[known])
        return self.traced[known]

    def _kinds(self, functions: Functions) -> list[Any]:
        return list(dict.fromkeys(functions.kind(n) for s in self.own for n in self.pipeline.layers[s]))

    def _plan(self, pieces: Pieces) -> None:
        place, last = self.pipeline.place, len(self.pipeline.layers) - 1
        homes = [
            [n for s, d in place.items() if d == device for n in self.pipeline.layers[s]] for device in range(self.par.mesh.shape.pipe)
        ]
        users: dict[str, list[int]] = {}
        outer = {name: part for name, part in self.specs.items() if name != "layers"}
        for (path, _), first, second in zip(tree.paths(outer), pieces.embed.used, pieces.head.used, strict=True):
            users[path] = [place[s] for s, used in ((0, first), (last, second)) if used]
        for path, spec in tree.paths(self.specs):
            self._moves[path] = plan(self.par, spec.axes, spec.shape, homes, users.get(path, ()))

    def to_stages(self, params: tree.Tree) -> tree.Tree:
        """Give this device's stages their parameters, or some of them, from those at rest."""
        types = dict(tree.paths(self.types))

        def one(path: str, x: Tensor) -> Tensor:
            move, x = self._moves[path], x.to(types[path])
            x = x if move is None else move.to_stage(x).contiguous()  # stages are traced on contiguous tensors
            return gather_step(self.inner, self.letters[path], x, self.precision.compute) if self.par.rules.gather == "step" else x

        return tree.map_paths(one, params)

    def to_rest(self, grads: tree.Tree, params: tree.Tree) -> tree.Tree:
        """Return gradients of ``params`` to where these rest."""
        known = dict(tree.paths(grads))

        def one(path: str, rest: Tensor) -> Tensor:
            move, grad = self._moves[path], known[path]
            grad = scatter_step(self.inner, self.letters[path], grad, rest) if self.par.rules.gather == "step" else grad
            return grad if move is None else move.to_rest(grad, rest)

        return tree.map_paths(one, params)

    def beside(self, held: Held | None, params: tree.Tree) -> tree.Tree:
        """Put stages' parameters that stay, brought there the first time, beside those that are trained."""
        if held is None:
            return params
        if held.staged is None:
            held.staged = self.to_stages(held.rest)
        found = dict([*tree.paths(held.staged), *tree.paths(params)])
        return tree.map_paths(lambda path, _: found[path], self.specs)


class Watch:
    """Times of a run's actions: of the device's stream on an accelerator, else of the process."""

    def __init__(self, device: torch.device) -> None:
        """Start to count."""
        self._device, self._events = device, list[tuple[Action, Any]]()
        if device.type == "cuda":
            torch.cuda.synchronize()  # so that the device's clock and the process's start together
        self._begun = self._now()
        self._host = time.time()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, action: Action, ended: bool) -> None:
        """Take the time before and after an action."""
        self._events.append((action, self._now()))

    def spans(self, device: int) -> tuple[Span, ...]:
        """Give the actions with their times, in seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        times = [self._host + self._since(at) for _, at in self._events]
        return tuple(Span(device, self._events[i][0], times[i], times[i + 1]) for i in range(0, len(times), 2))

    def _since(self, at: Any) -> float:
        return at - self._begun if self._device.type != "cuda" else self._begun.elapsed_time(at) / 1e3


class PipelinedStep:
    """The training step through a pipeline. It remembers of its last call the most activations stored, and if asked the times."""

    def __init__(
        self, staging: Staging, links: Links, update: Any, options: StepOptions, compile: Callable[[Callable[..., Any]], Any] | None
    ) -> None:
        """Take what was made."""
        self.staging, self.links, self.update, self.options = staging, links, update, options
        self.functions = staging.functions(parse_remat(options.remat))
        self.compile, self.watched, self.stored = compile, False, 0
        self.watch: Watch | None = None
        self.table: Table | None = None
        self._warm = set[tuple[int, str]]()

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        """Take a step, in place."""
        local, par = tree.map(to_local, state), self.staging.par
        with torch.no_grad():
            scale, count = loss_scale(par, local, batch)
            key = random.bits(random.key("dropout", self.options.seed), local.step)
            held: Any = batch.get("frozen")
            rest = {name: x for name, x in batch.items() if name != "frozen"}
            grads, shares = self.gradient(local.params, {**rest, "key": key}, scale, held)
            self.options.under_way()
            self.options.before_update()
            metrics = self.update(local, grads, shares, scale * count, count)
        return state, metrics

    def gradient(self, params: tree.Tree, batch: Batch, scale: Tensor, held: Held | None = None) -> tuple[tree.Tree, Tensor]:
        """Give gradients at rest (still to be summed over copies) and this device's shares of the losses."""
        staging = self.staging
        pieces = staging.pieces(self.functions, batch, self.compile)
        self.table = table = staging.pipeline.table(batch["tokens"].shape[0])
        weights = staging.beside(held, staging.to_stages(params))
        layers, own, how = staging.pipeline.layers, staging.own, (staging.par.reduce, staging.learning)
        if not self.links.tagged and (id(pieces), table.name) not in self._warm:
            self._warm.add((id(pieces), table.name))
            shape, dtype = pieces.embed.shape
            work = Training(self.functions, pieces, layers, own, weights, batch, scale, *how)
            warm_up(table, staging.device, work, torch.zeros(shape, dtype=dtype, device=scale.device))
            del work  # and its gradients
        work = Training(self.functions, pieces, layers, own, weights, batch, scale, *how)
        self.watch = Watch(scale.device) if self.watched else None
        traffic = self.links.open(table, *pieces.embed.shape, scale.device)
        self.stored = run(table, staging.device, work, traffic, None if self.watch is None else self.watch.mark)
        return staging.to_rest(work.grads, params), work.shares


def make_pipelined_step(
    model: Model,
    config: Any,
    par: Parallel,
    optimizer: Optimizer,
    schedule: Schedule,
    options: StepOptions,
    pipeline: Pipeline,
    whole: Model | None = None,
) -> PipelinedStep:
    """Make the step through a pipeline: as `make_step`, with a layout of layers and a table. Every process must call it.

    Where ``model`` trains some parameters of ``whole`` alone, the step runs beside the others (`mtl.train.frozen`).
    """
    staging = Staging(whole or model, config, par, options.precision, pipeline, model)
    letters = tree.map(lambda spec: spec.axes, model.specs(config))
    talks = options.overlap and staging.inner.mesh.shape.devices() > 1
    settings = inductor_options(options.backend, par.mesh.device_type, talks)
    plain = replace(par, rules=replace(par.rules, gather="layer"))  # gradients come back at rest
    finish = make_update(plain, letters, optimizer, schedule, options)
    update = compile_update(finish, optimizer, options)
    compile = None if options.compile == "none" else lambda fn: compiled(fn, options.backend, options=settings)
    return PipelinedStep(staging, Links(par.mesh, pipeline.place, par.engine), update, options, compile)


def make_pipelined_evaluate(
    model: Model, config: Any, par: Parallel, precision: Precision, pipeline: Pipeline
) -> Callable[[Any, Iterable[Batch]], float]:
    """Make ``evaluate(params, batches)`` through a pipeline: as `make_evaluate`."""
    passing = _Passing(model, model.for_evaluation(config), par, precision, pipeline)

    def entropy(params: Any, x: Tensor, batch: Batch) -> Tensor:
        value = passing.functions.head(params, x, batch)[1]
        count = batch["weights"].sum() / passing.staging.inner.copies("BS")
        return torch.stack([value, count.to(value.dtype)])

    def evaluate(params: Any, batches: Iterable[Batch]) -> float:
        sums: list[Tensor] = []
        with torch.no_grad():
            weights: Any = None
            for batch in batches:
                weights = passing.stage(params, batch) if weights is None else weights
                found = passing.run(weights, batch, entropy)
                zero = torch.zeros(2, dtype=batch["weights"].dtype, device=batch["weights"].device)
                sums.append(torch.stack([*found, zero]).sum(0).to(zero.dtype))
            total = psum(torch.stack(sums).sum(0), par.mesh.shape.active(), par.mesh).tolist()
        return total[0] / total[1]

    return evaluate


class _Passing:
    """Forwards through a pipeline."""

    def __init__(self, model: Model, config: Any, par: Parallel, precision: Precision, pipeline: Pipeline) -> None:
        self.staging = Staging(model, config, par, precision, pipeline)
        self.functions = self.staging.functions(Remat("none"))
        self.links = Links(par.mesh, pipeline.place, par.engine)

    def stage(self, params: Any, batch: Batch) -> Any:
        """Give the stages their parameters; the batch says shapes alone."""
        self.staging.pieces(self.functions, _keyed(batch), layers=False)
        return self.staging.to_stages(tree.map(to_local, params))

    def run(self, weights: Any, batch: Batch, finish: Callable[[Any, Tensor, Batch], Tensor]) -> Sequence[Tensor]:
        """Send micro-batches through; give what ``finish`` made of each where the last stage is, elsewhere nothing."""
        batch = _keyed(batch)
        pieces = self.staging.pieces(self.functions, batch, layers=False)
        table = forwards(self.staging.pipeline.place, batch["tokens"].shape[0])
        work = Forward(self.functions, self.staging.pipeline.layers, self.staging.own, weights, batch, finish)
        run(table, self.staging.device, work, self.links.open(table, *pieces.embed.shape, batch["tokens"].device))
        return [work.found[i] for i in sorted(work.found)]


def _keyed(batch: Batch) -> Batch:
    return batch if "key" in batch else {**batch, "key": torch.zeros((), dtype=torch.int64, device=batch["tokens"].device)}
