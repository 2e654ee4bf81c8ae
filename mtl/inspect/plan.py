"""What a step will cost one device: memory by part and when it peaks, products, bytes on every link, and time."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mtl.inspect import timing
from mtl.inspect.count import Counts, count, extrapolate, needed
from mtl.inspect.hardware import Device
from mtl.inspect.lifetime import Life, eager, fused
from mtl.inspect.record import Op, Trace, Wire
from mtl.inspect.timing import Traffic, traffic
from mtl.sharding.mesh import MeshShape

PARTS = (
    "weights", "optimizer", "gathered weights", "gradients", "activations", "logits and loss", "batch", "transfer slots", "workspace",
)  # fmt: skip
TAKES = {
    "products": "matrix products", "attention": "attention", "other kernels": "memory bandwidth (all other kernels)",
    "communication shown": "communication", "bubble": "the pipeline's bubble",
}  # fmt: skip
"""What a step's time goes to, and what bounds it then."""
OVERLAP = 2
"""How far the overlap pass of mtl.runtime moves gathers and sums."""


@dataclass(frozen=True)
class Records:
    """A step's records. ``few`` and ``more`` are the gradient of short models, ``rounds`` how often their difference is still to add.

    ``rest`` has the bytes on the device between steps; ``held`` those beside them while gradients are computed.
    """

    gather: Trace
    few: Trace
    more: Trace
    rounds: int
    update: Trace
    micro_batches: int
    compile: str
    gpu: bool
    mesh: MeshShape
    dtype: str
    rest: Mapping[str, int]
    held: Mapping[str, int]
    summed: int
    """Bytes of the sum of gradients, where several micro-batches are added up."""
    host: int = 0
    """Bytes of the state that rest in host memory."""
    streamed: int = 0
    """Bytes of that state on the device at once while it is updated."""

    def counts(self) -> dict[str, Counts]:
        """Count each part of a step: what happens once before, the gradients of all micro-batches, the update."""
        few, more = (count(self.ran(t)) for t in (self.few, self.more))
        gradient = Counts().plus(extrapolate(few, more, self.rounds), self.micro_batches)
        return {"before": count(self.gather.ops), "gradient": gradient, "update": count(self.ran(self.update))}

    def total(self) -> Counts:
        """Count the step."""
        found = Counts()
        for part in self.counts().values():
            found = found.plus(part)
        return found

    def ran(self, trace: Trace) -> list[Op]:
        """List the operations that run: all in eager mode; a compiled graph drops those whose results nothing uses."""
        return trace.ops if self.compile == "none" else needed(trace)

    def life(self, trace: Trace) -> Life:
        """Say how long the buffers of a record live, as the compile mode has it."""
        if self.compile == "none":
            return eager(trace)
        if trace is self.update:
            return fused(trace)
        if self.compile == "block":
            return fused(trace, plain=("embed", "head", "backward"))
        return fused(trace, OVERLAP if self.gpu and self.mesh.devices() > 1 else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak by part, and when the peak is."""

    parts: Mapping[str, int]
    when: str
    host: int = 0
    """Bytes in host memory: of state and of activations that wait there."""

    @property
    def peak(self) -> int:
        """Sum the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sent:
    """All collectives of one kind over the same axes in a step: ``bytes`` of their larger sides, ``sent`` from one device."""

    phase: str
    collective: str
    axes: tuple[str, ...]
    times: int
    bytes: int
    sent: int
    link: str
    seconds: float


@dataclass(frozen=True)
class Position:
    """One device of a pipeline: its stages, the most micro-batches of a stage that it stores at once, its memory."""

    device: int
    stages: tuple[int, ...]
    layers: int
    stored: int
    memory: Memory


@dataclass(frozen=True)
class Piped:
    """A pipeline's part of a plan. ``bubble`` is the share of all devices' time in which they wait; None without a device table."""

    schedule: str
    microbatches: int
    layers_per_stage: tuple[int, ...]
    bubble: float | None
    positions: tuple[Position, ...]


@dataclass(frozen=True)
class Plan:
    """A step on one device of a mesh. Times are None where no device table says how fast it is."""

    memory: Memory
    capacity: int | None
    matmuls: int
    matmul_flops: int
    attention_flops: int
    traffic: tuple[Sent, ...]
    seconds: Mapping[str, float] | None
    tokens: int
    devices: int
    model_flops: float
    peak_flops: float | None
    notes: tuple[str, ...] = field(default=())
    piped: Piped | None = None

    @property
    def fits(self) -> bool | None:
        """Say whether the device has room."""
        return None if self.capacity is None else self.memory.peak <= self.capacity

    @property
    def step(self) -> float | None:
        """Give the step's time in seconds."""
        return None if self.seconds is None else self.seconds["step"]

    @property
    def tokens_per_second(self) -> float | None:
        """Give the speed of one device."""
        return None if self.step is None else self.tokens / self.step / self.devices

    @property
    def mfu(self) -> float | None:
        """Give the share of the peak that the model's own operations (causal attention) reach."""
        if self.tokens_per_second is None or self.peak_flops is None:
            return None
        return self.tokens_per_second * self.model_flops / self.peak_flops

    @property
    def bound(self) -> tuple[str, float] | None:
        """Name what takes most of the step's time, and its share."""
        if self.seconds is None or not self.step:
            return None
        name = max(TAKES, key=lambda part: (self.seconds or {})[part])
        return TAKES[name], self.seconds[name] / self.step

    def as_json(self) -> dict[str, object]:
        """Give the plan as plain values."""
        return {
            "memory": {
                **self.memory.parts,
                "peak": self.memory.peak,
                "host": self.memory.host,
                "when": self.memory.when,
                "capacity": self.capacity,
                "fits": self.fits,
            },
            "flops": {"matmul": self.matmul_flops, "attention": self.attention_flops, "matmuls": self.matmuls},
            "collectives": [dataclasses.asdict(t) for t in self.traffic],
            "seconds": None if self.seconds is None else dict(self.seconds),
            "bound": None if self.bound is None else {"by": self.bound[0], "share": self.bound[1]},
            "tokens_per_step": self.tokens,
            "devices": self.devices,
            "tokens_per_second_per_device": self.tokens_per_second,
            "mfu": self.mfu,
            "notes": list(self.notes),
            "pipeline": None if self.piped is None else dataclasses.asdict(self.piped),
        }


def make_plan(records: Records, device: Device | None, tokens: int, model_flops: float) -> Plan:
    """Plan a step from its records. ``model_flops`` are a token's, for the MFU; without a device table there are no times."""
    found = records.total()
    peak = None if device is None else device.peak(records.dtype)
    workspace = 0 if device is None else device.workspace_bytes
    seconds = None if device is None else times(records, device)
    return Plan(
        memory(records, workspace), None if device is None else device.memory_bytes, found.matmuls, found.matmul_flops,
        found.attention_flops, tuple(sent(records, device)), seconds, tokens, records.mesh.devices(), model_flops, peak,
    )  # fmt: skip


def memory(records: Records, workspace: int = 0) -> Memory:
    """Find the peak over a step's phases: before, the gradients of a micro-batch, the update."""
    few, more = records.life(records.few), records.life(records.more)
    best: tuple[int, dict[str, int], str] = (0, {}, "at rest")
    pairs = _aligned(few, more)
    low, high = few.timeline(), more.timeline()
    place = max(pairs, key=lambda p: low[p[0]] + records.rounds * (high[p[1]] - low[p[0]]))
    at_low, at_high = few.alive(place[0]), more.alive(place[1])
    parts = {k: at_low.get(k, 0) + records.rounds * (at_high.get(k, 0) - at_low.get(k, 0)) for k in {*at_low, *at_high}}
    if records.micro_batches > 1:
        parts["gradients"] = parts.get("gradients", 0) + records.summed
    best = _phase(records, parts, _where(few, place[0]))
    update = records.life(records.update)
    if update.kernels:
        during, when = update_memory(records.update, update)
        during["workspace"] += records.streamed
        best = max(best, _phase(records, during, when), key=lambda found: found[0])
    parked = [sum(trace.parked.values()) for trace in (records.few, records.more)]
    return Memory(known_parts(best[1], workspace), best[2], records.host + parked[0] + records.rounds * (parked[1] - parked[0]))


def update_memory(trace: Trace, life: Life) -> tuple[dict[str, int], str]:
    """Give what is there beside the state at the update's peak, and when that is."""
    line = life.timeline()
    top = max(range(len(line)), key=line.__getitem__)
    during = life.alive(top)
    grads = sum(n for b, n in life.sizes.items() if trace.inputs.get(b, "").startswith("gradients"))
    parts = {"gradients": during.get("gradients", 0) + grads, "workspace": sum(n for k, n in during.items() if k != "gradients")}
    return parts, f"update, {life.kernels[top].op.name}"


def known_parts(parts: Mapping[str, int], workspace: int) -> dict[str, int]:
    """Sort bytes into the parts that a plan shows."""
    known = {part: parts.get(part, 0) for part in PARTS}
    known["workspace"] += workspace + sum(n for part, n in parts.items() if part not in PARTS)
    return known


def _phase(records: Records, parts: Mapping[str, int], when: str) -> tuple[int, dict[str, int], str]:
    whole = dict(records.rest)
    for held in (records.held, parts):
        for part, n in held.items():
            whole[part] = whole.get(part, 0) + n
    return sum(whole.values()), whole, when


def _where(life: Life, place: int) -> str:
    """Say in words where in a step a kernel is."""
    op = life.kernels[place].op
    scope = {
        "embed": "embedding",
        "block": "forward of the last layer",
        "head": "head and loss",
        "again": "backward, a layer computed again",
    }
    later = max((k.place for k in life.kernels if k.op.scope == "head"), default=0)
    backward = "start of backward" if place - later < len(life.kernels[later:]) / 3 else "backward"
    return f"{scope.get(op.scope, backward)}, {op.name}"


def _aligned(few: Life, more: Life) -> list[tuple[int, int]]:
    """Pair the kernels of two models that differ by a round of layers: around the head, and from the end.

    Around the head the short model's outermost layer is left out: what a compiler starts ahead of it is missing there, and would count
    once for every round.
    """
    depth = max((op.layer for op, _ in few.steps if op.scope == "block"), default=0)  # layers but the outermost

    def same(i: int, j: int) -> bool:
        a, b = few.steps[i][0], more.steps[j][0]
        return (a.name, a.scope, a.shape) == (b.name, b.scope, b.shape)

    def run(i: int, j: int, step: int, most: int) -> list[tuple[int, int]]:
        pairs: list[tuple[int, int]] = []
        while 0 <= i < len(few.steps) and 0 <= j < len(more.steps) and same(i, j) and len(pairs) < most:
            pairs.append((few.steps[i][1], more.steps[j][1]))
            i, j = i + step, j + step
        return pairs

    heads = [next((i for i, (op, _) in enumerate(life.steps) if op.scope == "head"), 0) for life in (few, more)]
    last = max((i for i, (op, _) in enumerate(few.steps) if op.scope == "head"), default=0)
    before, after = heads[0] * depth // (depth + 1), last - heads[0] + (len(few.steps) - last) * depth // (depth + 1)
    found = run(heads[0], heads[1], 1, after) + run(heads[0] - 1, heads[1] - 1, -1, before)
    found += run(len(few.steps) - 1, len(more.steps) - 1, -1, len(few.steps))
    return found or [(0, 0)]


def sent(records: Records, device: Device | None) -> list[Sent]:
    """List a step's collectives by phase, kind and axes."""
    phases: list[tuple[str, Sequence[tuple[Sequence[Op], int]]]] = [
        ("before", [(records.gather.ops, 1)]),
        ("gradient", [(records.ran(records.few), (1 - records.rounds) * records.micro_batches),
                      (records.ran(records.more), records.rounds * records.micro_batches)]),
        ("update", [(records.ran(records.update), 1)]),
    ]  # fmt: skip
    return sent_in(phases, records.mesh, device)


def sent_in(phases: Sequence[tuple[str, Sequence[tuple[Sequence[Op], int]]]], mesh: MeshShape, device: Device | None) -> list[Sent]:
    """Add up what lists of operations send, each taken so many times, by phase."""
    rows: list[Sent] = []
    for phase, lists in phases:
        sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        links: dict[tuple[str, tuple[str, ...]], str] = {}
        for ops, weight in lists:
            for wire in (op.wire for op in ops if op.wire is not None):
                key = (wire.collective, wire.axes)
                went = _traffic(wire, mesh, device)
                links[key] = went.link
                row = sums.setdefault(key, [0, 0, 0, 0.0])
                for i, value in enumerate((1, wire.bytes, went.sent, went.seconds)):
                    row[i] += weight * value
        for key, (times_, size, out, time) in sums.items():
            if times_:
                rows.append(Sent(phase, *key, round(times_), round(size), round(out), links[key], time))
    return rows


def _traffic(wire: Wire, mesh: MeshShape, device: Device | None) -> Traffic:
    if device is not None:
        return traffic(wire, mesh, device)
    count = 1
    for axis in wire.axes:
        count *= getattr(mesh, axis)
    twice = 2 if wire.collective == "all_reduce" else 1
    return Traffic(wire.sent if wire.sent is not None else round(twice * wire.bytes * (count - 1) / count), "", 0.0)


def times(records: Records, device: Device) -> dict[str, float]:
    """Time a step: products, attention, other kernels, the communication that shows, and their sum."""
    overlapped = records.gpu and records.compile == "step"

    def part(trace: Trace, hides: bool) -> dict[str, float]:
        return timing.seconds(records.life(trace), records.mesh, device, records.dtype, hides)

    few, more = part(records.few, overlapped), part(records.more, overlapped)
    gradient = timing.combine((few, more), (1 - records.rounds, records.rounds))
    gather = part(records.gather, False)
    update = update_seconds(records.update, records.life(records.update), records.mesh, device, records.dtype, records.compile != "none")
    found = timing.combine((gather, gradient, update), (1, records.micro_batches, 1))
    if records.micro_batches > 1:  # sums are read and written, gradients read
        adding = 3 * (records.micro_batches - 1) * records.summed
        found["other kernels"] += adding / (device.memory_bandwidth * device.efficiency["memory"])
    shown = timing.exposed(found, device)
    update_time = sum(update[k] for k in ("products", "attention", "other kernels", "communication"))
    compute = found["products"] + found["attention"] + found["other kernels"]
    hidden = found["communication"] + found["hidden communication"] - shown
    return {
        "products": found["products"], "attention": found["attention"], "other kernels": found["other kernels"],
        "of these the update": update_time, "communication shown": shown, "communication hidden": hidden, "bubble": 0.0,
        "step": compute + shown,
    }  # fmt: skip


def update_seconds(trace: Trace, life: Life, mesh: MeshShape, device: Device, dtype: str, compiled: bool) -> dict[str, float]:
    """Time the update by kind: compiled, one pass over state and gradients, after one over the gradients for their norm."""
    found = timing.seconds(life, mesh, device, dtype, False)
    if compiled:
        state = sum(n for b, n in trace.sizes.items() if b in trace.outputs and b in trace.inputs)
        grads = sum(n for b, n in trace.sizes.items() if trace.inputs.get(b, "").startswith("gradients"))
        found["other kernels"] = 2 * (state + grads) / (device.memory_bandwidth * device.efficiency["memory"])
    return found
