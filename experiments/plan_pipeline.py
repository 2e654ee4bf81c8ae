"""Plans of steps through a pipeline: the library's own stages recorded piece by piece, and its table run on paper with what they take.

A stage is an embedding, layers, a head; each is recorded once, forward and backward apart, on tensors without memory. The table says in
which order every device runs them: so what each stores when, and how long it waits, follows.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments import recording
from mtl import tree
from mtl.inspect import timing
from mtl.inspect.count import Counts, count, needed
from mtl.inspect.hardware import Device
from mtl.inspect.lifetime import Life, eager, fused
from mtl.inspect.mesh import number
from mtl.inspect.plan import Memory, Piped, Plan, Position, Sent, known_parts, sent_in, update_memory, update_seconds
from mtl.inspect.record import Op, Recorder, Trace, Wire
from mtl.inspect.timing import traffic
from mtl.kernels.mailbox import room
from mtl.models import decoder
from mtl.pipeline import mail
from mtl.pipeline.pieces import Piece
from mtl.pipeline.simulate import Costs, Timeline, simulate
from mtl.pipeline.stage import SHARED, Functions, Pieces, micro_batch
from mtl.pipeline.table import Action
from mtl.train.loss import parse_remat
from mtl.train.pipelined import Pipeline, Staging
from mtl.train.step import loss_scale

KINDS = ("F", "B", "I", "W")
"""What actions run of a piece; I is a backward that leaves the weights' gradients to W."""


@dataclass(frozen=True, eq=False)
class Half:
    """Part of a piece: its operations, the most bytes that it makes at once, its time by kind."""

    ops: tuple[Op, ...]
    top: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Cost:
    """What one piece takes: its halves by kind, and what it keeps.

    ``kept`` bytes stay from forward to backward, ``left`` of them from I to W, ``beside`` of what all layers of a stage share.
    """

    halves: Mapping[str, Half]
    kept: int
    left: int
    beside: int
    keeps_input: bool
    part: str


@dataclass(frozen=True)
class Seat:
    """One device of the pipeline: bytes between steps, bytes of a step's weights and gradients, and what is exchanged for them."""

    rest: Mapping[str, int]
    staged: int
    gradients: int
    returned: int
    there: Trace
    back: Trace


def plan(job: recording.Job, pipeline: Pipeline, device: Device | None, tokens: int, model_flops: float) -> Plan:
    """Plan a step: the memory of the fullest device of the pipeline, the work of the busiest, the time that all take."""
    drawn = Drawn(job, pipeline, device)
    table, times = drawn.table, drawn.simulated()
    positions = tuple(drawn.position(d, times) for d in range(table.devices))
    busiest = max(range(table.devices), key=lambda d: drawn.work(d).matmul_flops + drawn.work(d).attention_flops)
    fullest = max(positions, key=lambda p: p.memory.peak)
    found = drawn.work(busiest)
    layers = tuple(len(layers) for layers in pipeline.layers)
    return Plan(
        fullest.memory, None if device is None else device.memory_bytes, found.matmuls, found.matmul_flops, found.attention_flops,
        tuple(drawn.sent(busiest)), drawn.seconds(busiest, times), tokens, job.mesh.devices(), model_flops,
        None if device is None else device.peak(drawn.dtype),
        piped=Piped(table.name, table.microbatches, layers, None if device is None else times.bubble, positions),
    )  # fmt: skip


class Drawn:
    """A pipeline on paper: what its pieces cost, what its devices hold."""

    def __init__(self, job: recording.Job, pipeline: Pipeline, device: Device | None) -> None:
        """Record the pieces and the exchange of every device."""
        self.job, self.pipeline, self.device = job, pipeline, device
        self.table = pipeline.table(job.micro_batches)
        self.dtype = str(job.options.precision.compute).removeprefix("torch.")
        self.compiled = job.options.compile != "none"
        self.costs: dict[Any, Cost] = {}
        with recording.world(job.kind) as make, torch.no_grad():
            self._make = make
            one = recording.local_batch(job, job.parallel(), make)
            _, self.before = _recorded(lambda: loss_scale(job.parallel(), recording.local_state(job, job.parallel(), make), one), {})
            batch = {k: x if k in SHARED else make((job.micro_batches, *x.shape), x.dtype) for k, x in one.items()}
            stagings = [self._staging(d) for d in range(job.mesh.pipe)]
            functions = stagings[0].functions(parse_remat(job.options.remat))
            every = self._staging(0)
            every.own = list(range(self.table.stages))
            pieces = every.pieces(functions, batch)
            self.message = torch.Size(pieces.embed.shape[0]).numel() * pieces.embed.shape[1].itemsize
            self.seats: list[Seat] = []
            for staging in stagings:
                staging.traced = every.traced
                staging.pieces(functions, batch)
                self.seats.append(self._seat(staging, functions, pieces, batch))
        last = len(pipeline.layers) - 1
        self.stages = [
            [
                *([self.costs["embed"]] if s == 0 else []),
                *(self.costs[functions.kind(n)] for n in layers),
                *([self.costs["head"]] if s == last else []),
            ]
            for s, layers in enumerate(pipeline.layers)
        ]
        self.after = recording.record_update(dataclasses.replace(job, rules=dataclasses.replace(job.rules, gather="layer")))

    def _staging(self, d: int) -> Staging:
        par = self.job.parallel(number(self.job.mesh, {"pipe": d}))
        return Staging(decoder, self.job.config, par, self.job.options.precision, self.pipeline)

    def _seat(self, staging: Staging, functions: Functions, pieces: Pieces, batch: dict[str, Tensor]) -> Seat:
        """Take down one device, and the pieces that no device before it had."""
        par = staging.par
        state = recording.local_state(self.job, par, self._make)
        weights, there = _recorded(lambda: staging.to_stages(state.params), {"params": state.params})
        grads = tree.map(lambda w: self._make(w.shape, torch.promote_types(w.dtype, par.reduce)), weights)
        rest, back = _recorded(lambda: staging.to_rest(grads, state.params), {"gradients": grads})
        self._record(staging, functions, pieces, weights, batch)
        held = {"weights": recording.nbytes(state.params), "optimizer": recording.nbytes(state.opt_state), "batch": recording.nbytes(batch)}
        if self.job.engine:
            sources = [sorted({a for a, b in self.table.messages() if b == d}) for d in range(self.table.devices)]
            held["transfer slots"] = room(sources, staging.device, mail.slots(self.table), self.message)
        return Seat(held, _new(weights, state.params), recording.nbytes(grads), _new(rest, grads), there, back)

    def _record(self, staging: Staging, functions: Functions, pieces: Pieces, weights: Any, batch: dict[str, Tensor]) -> None:
        outer = tree.leaves({k: v for k, v in weights.items() if k != "layers"})
        shape, dtype = pieces.embed.shape
        every, batch = tree.leaves(batch), micro_batch(batch, 0)
        x, stream = self._make(shape, dtype), functions.beside(batch)
        beside = [t for t in tree.leaves(stream) if _new([t], every)]
        if 0 in staging.own:
            self.costs["embed"] = self._cost(pieces.embed, outer, None, tree.leaves(batch), "embed")
        if self.table.stages - 1 in staging.own:
            self.costs["head"] = self._cost(pieces.head, outer, x, tree.leaves(batch), "head")
        for row, layer in enumerate(sorted(n for s in staging.own for n in self.pipeline.layers[s])):
            kind = functions.kind(layer)
            if kind not in self.costs:
                extra = {"key": functions.layer_key(stream["key"], layer)} if "key" in stream else {}
                own = [w[row] for w in tree.leaves(weights["layers"])]
                self.costs[kind] = self._cost(pieces.blocks[kind], own, x, tree.leaves({**stream, **extra}), "block", beside)

    def _cost(
        self, piece: Piece, weights: list[Tensor], x: Tensor | None, rest: list[Tensor], scope: str, beside: Sequence[Tensor] = ()
    ) -> Cost:
        """Record one piece's halves."""
        leaves, tangent = [*weights, *([] if x is None else [x]), *rest], self._make(*piece.shape)
        (_, kept), forward = self._half(lambda: piece.run_forward(leaves), leaves, scope)
        known = [*weights, *rest]
        saved = [*kept.values(), tangent]
        adding = sum(w.numel() * (w.element_size() + 2 * torch.promote_types(w.dtype, self.job.parallel().reduce).itemsize)
                     for w, grad in zip(weights, piece.grads, strict=True) if grad is not None)  # fmt: skip
        _, backward = self._half(lambda: piece.run_backward(dict(kept), tangent), saved, "backward", adding)
        (_, left), inputs = self._half(lambda: piece.run_inputs(dict(kept), tangent), saved, "backward")
        _, later = self._half(lambda: piece.run_weights(dict(left)), list(left.values()), "backward", adding)
        halves = {"F": forward, "B": backward, "I": inputs, "W": later}
        part = "logits and loss" if scope == "head" else "workspace"
        shared = _new(beside, ()) - _new(beside, kept)
        return Cost(halves, _new(kept, known), _new(left, known), shared, x is not None and not _new([x], kept), part)

    def _half(self, run: Callable[[], Any], given: list[Tensor], scope: str, adding: int = 0) -> tuple[Any, Half]:
        """Record one half; ``adding`` are the bytes that sums of gradients then move."""
        out, trace = _recorded(run, {"given": given}, scope, self.compiled)
        life = self._life(trace)
        seconds: dict[str, float] = {}
        if self.device is not None:
            seconds = timing.seconds(life, self.job.mesh, self.device, self.dtype, False)
            seconds["other kernels"] += adding / (self.device.memory_bandwidth * self.device.efficiency["memory"])
        return out, Half(tuple(needed(trace) if self.compiled else trace.ops), max(life.timeline(), default=0), seconds)

    def _life(self, trace: Trace) -> Life:
        return fused(trace) if self.compiled else eager(trace)

    def simulated(self) -> Timeline:
        """Run the table on paper."""
        if self.device is None:
            return simulate(self.table)
        stages = tuple({kind: sum(sum(c.halves[kind].seconds.values()) for c in stage) for kind in KINDS} for stage in self.stages)
        send = traffic(Wire("permute", ("pipe",), self.message, self.message), self.job.mesh, self.device).seconds
        return simulate(self.table, Costs(send=send, stages=stages))

    def _kind(self, action: Action) -> str:
        return "I" if action.kind == "B" and (action.stage, action.micro) in self.table.split else action.kind

    def runs(self, d: int) -> list[tuple[Half, int]]:
        """List what a device runs in a step, with how often."""
        often = Counter(c.halves[self._kind(a)] for a in self.table.rows[d] for c in self.stages[a.stage])
        return list(often.items())

    def work(self, d: int) -> Counts:
        """Count what a device computes and sends in a step's gradients."""
        found = Counts()
        for half, n in self.runs(d):
            found = found.plus(count(half.ops), n)
        return found

    def position(self, d: int, times: Timeline) -> Position:
        """Find a device's peak over the step: its stages, the return of the gradients, the update."""
        seat, parts, when = self.seats[d], *self._fullest(d)
        held = {**seat.rest, "gathered weights": seat.staged, "gradients": seat.gradients}
        update = self._life(self.after)
        changed, last = update_memory(self.after, update)
        phases = [
            (_sum(held, parts), when),
            (_sum(held, {"gradients": seat.returned}), "gradients on their way to rest"),
            (_sum(seat.rest, changed), last),
        ]
        best, when = max(phases, key=lambda phase: sum(phase[0].values()))
        own = self.table.on(d)
        workspace = 0 if self.device is None else self.device.workspace_bytes
        return Position(d, own, sum(len(self.pipeline.layers[s]) for s in own), times.stored[d], Memory(known_parts(best, workspace), when))

    def _fullest(self, d: int) -> tuple[dict[str, int], str]:
        """Walk through a device's actions: what is stored, and what each piece makes beside it."""
        stored, best, when = 0, dict[str, int](), ""
        for action in self.table.rows[d]:
            kind, stage = self._kind(action), self.stages[action.stage]
            held = max(cost.beside for cost in stage)
            held += self.message if action.stage and not stage[0].keeps_input and not self.job.engine else 0
            for cost in stage if kind == "F" else stage[::-1]:
                top = cost.halves[kind].top
                if stored + top > sum(best.values()):
                    best, when = {"activations": stored, cost.part: top}, f"{action}, {cost.part.replace('workspace', 'a layer')}"
                stored += {"F": cost.kept, "B": -cost.kept, "I": cost.left - cost.kept, "W": -cost.left}[kind]
            stored += held * {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
        return best, when

    def seconds(self, d: int, times: Timeline) -> dict[str, float] | None:
        """Time the step as one device sees it: what it does, and how long it waits."""
        if self.device is None:
            return None
        mesh, seat = self.job.mesh, self.seats[d]
        busy = timing.combine([half.seconds for half, _ in self.runs(d)], [n for _, n in self.runs(d)])
        moved = [timing.seconds(eager(trace), mesh, self.device, self.dtype, False) for trace in (seat.there, seat.back)]
        update = update_seconds(self.after, self._life(self.after), mesh, self.device, self.dtype, self.compiled)
        found = timing.combine((busy, *moved, update), (1, 1, 1, 1))
        waits = times.length - sum(busy.values())
        return {
            "products": found["products"], "attention": found["attention"], "other kernels": found["other kernels"],
            "of these the update": sum(update.values()), "communication shown": found["communication"], "communication hidden": 0.0,
            "bubble": waits, "step": sum(found.values()) + waits,
        }  # fmt: skip

    def sent(self, d: int) -> list[Sent]:
        """List what a device sends: parameters to stages and gradients back, messages, what layers and the update exchange."""
        there, back = self.seats[d].there.ops, self.seats[d].back.ops
        inside = [(half.ops, n) for half, n in self.runs(d)]
        rows = sent_in([("before", [(self.before.ops, 1), (there, 1)]), ("gradient", inside)], self.job.mesh, self.device)
        messages = sum(len(goals) for (source, _), goals in self.table.messages().items() if source == d)
        if messages:
            wire = Wire("permute", ("pipe",), self.message, self.message)
            went = None if self.device is None else traffic(wire, self.job.mesh, self.device)
            size, link, time = messages * self.message, "" if went is None else went.link, 0.0 if went is None else went.seconds
            rows.append(Sent("gradient", "message", ("pipe",), messages, size, size, link, messages * time))
        update = needed(self.after) if self.compiled else self.after.ops
        return rows + sent_in([("update", [(back, 1), (update, 1)])], self.job.mesh, self.device)


def _recorded(run: Callable[[], Any], given: Mapping[str, Any], scope: str = "", compiled: bool = False) -> tuple[Any, Trace]:
    """Run a function under a recorder; what it gives lives to the end."""
    recorder = Recorder(compiled)
    recorder.scope = scope
    with recorder:
        for name, values in given.items():
            recorder.label(name, values)
        out = run()
        recorder.label("results", _tensors(out), outputs=True)
        recorder.sweep()
    return out, recorder.trace


def _tensors(values: Any) -> list[Tensor]:
    """List the tensors of lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return [values]
    inner: Iterable[Any] = values.values() if isinstance(values, Mapping) else values if isinstance(values, (list, tuple)) else ()
    return [x for value in inner for x in _tensors(value)]


def _new(values: Any, known: Any) -> int:
    """Count the bytes of what is not memory of ``known``."""
    there = {x.untyped_storage()._cdata for x in _tensors(known)}  # pyright: ignore[reportPrivateUsage]
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in _tensors(values)}  # pyright: ignore[reportPrivateUsage]
    return sum(n for address, n in found.items() if address not in there)


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        for name, n in part.items():
            found[name] = found.get(name, 0) + n
    return found
