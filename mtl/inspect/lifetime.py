"""How long every buffer of a record lives, and what is alive when: as Python holds them, or as a compiler that fuses kernels would."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mtl.inspect.count import needed
from mtl.inspect.record import Op, Trace

READS = 4
"""A compiler stores a cheap value that reads more than this many buffers; below it computes the value again in every reader (inductor's
realize_reads_threshold)."""
BLOCK = 512
"""The allocator rounds up to this many bytes."""


@dataclass(frozen=True)
class Kernel:
    """What runs: an operation, with what was fused into it, the bytes it reads and writes, and its place in the record."""

    op: Op
    place: int
    bytes: int


@dataclass(frozen=True)
class Life:
    """A record's kernels in order, and for every buffer that is ever stored the kernels between which it lives (both included)."""

    kernels: tuple[Kernel, ...]
    spans: Mapping[int, tuple[int, int]]
    sizes: Mapping[int, int]
    kinds: Mapping[int, str]
    steps: tuple[tuple[Op, int], ...]
    """Every operation, fused or not, with the kernel that was last when it came."""

    def timeline(self) -> list[int]:
        """Give the bytes alive at every kernel, without the arguments."""
        change = [0] * (len(self.kernels) + 1)
        for buffer, (born, died) in self.spans.items():
            change[born] += self.sizes[buffer]
            change[died + 1] -= self.sizes[buffer]
        alive, total = [], 0
        for step in change[:-1]:
            total += step
            alive.append(total)
        return alive

    def alive(self, place: int) -> dict[str, int]:
        """Sum what is alive at one kernel by kind."""
        found: dict[str, int] = {}
        for buffer, (born, died) in self.spans.items():
            if born <= place <= died:
                found[self.kinds[buffer]] = found.get(self.kinds[buffer], 0) + self.sizes[buffer]
        return found


def eager(trace: Trace) -> Life:
    """Follow the record itself: every operation is a kernel, and a buffer lives until nothing held it any more."""
    places = [i for i, op in enumerate(trace.ops) if op.kind not in ("view", "wait")]
    kernels = tuple(Kernel(trace.ops[i], place, trace.ops[i].moved) for place, i in enumerate(places))
    after = _next_kernel(places, len(trace.ops))
    last = len(kernels) - 1
    spans: dict[int, tuple[int, int]] = {}
    for i, op in enumerate(trace.ops):
        for buffer in op.makes:
            died = trace.freed.get(buffer, len(trace.ops))
            spans[buffer] = (min(after[i], last), max(min(after[i], last), min(after[min(died + 1, len(trace.ops))] - 1, last)))
    steps = tuple((op, min(after[i], last)) for i, op in enumerate(trace.ops))
    return Life(kernels, spans, _rounded(trace), _kinds(trace, trace.ops), steps)


def fused(trace: Trace, overlap: int = 0, plain: tuple[str, ...] = ()) -> Life:
    """Fuse as a compiler does.

    What nothing uses is dropped. Elementwise values are computed inside the kernels that read them, unless a product, attention, a
    collective or the caller needs them in memory, or they read too much. A stored value lives from its kernel to the last that reads it,
    directly or through values computed inside; an elementwise kernel writes over an argument that ends there. With ``overlap``, weights
    are gathered that many gathers ahead of their use, and summed gradients are collected as many sums later. Scopes in ``plain`` are not
    compiled: there every value is stored.
    """
    ops = _once([op for op in needed(trace) if op.kind not in ("view", "wait")], trace)
    stored = _stored(trace, ops) | {b for op in ops if op.scope in plain for b in op.makes}
    use: dict[int, int] = {}  # buffer -> the last kernel that reads it
    through: dict[int, set[int]] = {}  # what an inlined value reads from memory
    for op in ops:
        if op.makes and not any(b in stored for b in op.makes):
            sources = {s for b in op.reads for s in ({b} if b in stored else through.get(b, set()))}
            through.update(dict.fromkeys(op.makes, sources))
    kernels: list[Kernel] = []
    steps: list[tuple[Op, int]] = []
    spans: dict[int, tuple[int, int]] = {}
    for op in ops:
        inlined = bool(op.makes) and not any(b in stored for b in op.makes)
        steps.append((op, max(0, len(kernels) - inlined)))
        if inlined:
            continue
        here = len(kernels)
        reads = {s for b in op.reads for s in ({b} if b in stored else through.get(b, set()))}
        moved = (
            sum(trace.sizes[b] for b in (*reads, *op.makes, *op.writes)) if op.kind in ("pointwise", "reduction", "opaque") else op.moved
        )
        if op.name == "embedding":
            moved = 2 * sum(trace.sizes[b] for b in op.makes)
        kernels.append(Kernel(op, here, moved))
        for b in reads:
            use[b] = here
        for b in op.makes:
            spans[b] = (here, here)
    for b, (born, _) in spans.items():
        kept = b in trace.outputs
        spans[b] = (born, len(kernels) - 1 if kept else max(born, use.get(b, born)))
    _reuse(kernels, spans, trace)
    kinds, sizes = _kinds(trace, ops), _rounded(trace)
    head = max((k.place for k in kernels if k.op.scope == "head"), default=len(kernels))
    for k in kernels:  # what backward reads through values computed inside its kernels
        if k.op.scope in ("embed", "block"):
            kinds.update({b: "activations" for b in k.op.makes if kinds[b] == "workspace" and spans[b][1] > head})
    if overlap:
        _stretch(kernels, spans, kinds, overlap)
    return Life(tuple(kernels), spans, sizes, kinds, tuple(steps))


def _stored(trace: Trace, ops: Sequence[Op]) -> set[int]:
    """Choose the buffers that are in memory."""
    readers: dict[int, list[Op]] = {}
    for op in ops:
        for b in op.reads:
            readers.setdefault(b, []).append(op)
    stored = set(trace.inputs) | set(trace.outputs) | {b for op in trace.ops if op.name == "stored" for b in op.reads}
    made = {b for op in ops for b in op.makes}
    stored |= {b for op in ops for b in op.reads if b not in made}
    reads: dict[int, int] = {}
    for op in ops:
        count = sum(1 if b in stored else reads.get(b, 1) for b in op.reads)
        for b in op.makes:
            needs = any(r.kind in ("matmul", "attention", "collective") or b in r.writes for r in readers.get(b, ()))
            needs = needs or any(r.kind == "opaque" and r.name not in ("cat", "stack") for r in readers.get(b, ()))
            many = len(readers.get(b, ())) > 1 and count > READS
            if op.kind != "pointwise" or needs or many or b in stored:
                stored.add(b)
            else:
                reads[b] = max(count, 1)
    return stored


def _reuse(kernels: Sequence[Kernel], spans: dict[int, tuple[int, int]], trace: Trace) -> None:
    """Let elementwise kernels write over an argument of the same size that nothing reads later."""
    ends: dict[int, list[int]] = {}
    for b, (_, died) in spans.items():
        ends.setdefault(died, []).append(b)
    for kernel in kernels:
        if kernel.op.kind != "pointwise":
            continue
        for b in kernel.op.makes:
            fits = [a for a in ends.get(kernel.place, ()) if a != b and trace.sizes[a] == trace.sizes[b] and spans[a][0] < kernel.place]
            if fits and fits[0] not in trace.outputs:
                spans[fits[0]] = (spans[fits[0]][0], kernel.place - 1)
                ends[kernel.place].remove(fits[0])


def sums_gradients(op: Op, kinds: Mapping[int, str]) -> bool:
    """Tell whether an operation sums gradients over devices and leaves each its part, in one step or by an exchange."""
    if op.wire is None or op.wire.collective not in ("reduce_scatter", "all_to_all"):
        return False
    return op.wire.collective == "reduce_scatter" or any(kinds.get(b) == "gradients" for b in (*op.reads, *op.makes))


def _stretch(kernels: Sequence[Kernel], spans: dict[int, tuple[int, int]], kinds: Mapping[int, str], overlap: int) -> None:
    """Start gathers of weights earlier, and end what is summed over devices later."""
    gathers = [
        (k.place, b)
        for k in kernels
        for b in k.op.makes
        if k.op.wire is not None and k.op.wire.collective == "all_gather" and kinds[b] == "gathered weights"
    ]
    for (_, b), (earlier, _) in zip(gathers[overlap:], gathers, strict=False):
        spans[b] = (min(earlier, spans[b][0]), spans[b][1])
    sums = [k for k in kernels if sums_gradients(k.op, kinds)]
    for k, later in zip(sums, sums[overlap:], strict=False):
        for b in (*k.op.reads, *k.op.makes):
            if b in spans:
                spans[b] = (spans[b][0], max(spans[b][1], later.place))


def _once(ops: Sequence[Op], trace: Trace) -> list[Op]:
    """Merge equal casts of one argument: a compiler does each once and keeps the result."""
    seen: dict[tuple[str, tuple[int, ...], int], int] = {}
    same: dict[int, int] = {}
    kept: list[Op] = []
    for op in ops:
        reads = tuple(dict.fromkeys(same.get(b, b) for b in op.reads))
        if op.name == "_to_copy" and len(op.makes) == 1 and all(b in trace.inputs for b in reads):
            key = (op.name, reads, op.moved)
            if key in seen:
                same[op.makes[0]] = seen[key]
                continue
            seen[key] = op.makes[0]
        kept.append(replace(op, reads=reads) if reads != op.reads else op)
    return kept


def _kinds(trace: Trace, ops: Sequence[Op]) -> dict[int, str]:
    """Say what every buffer is for: gathered weights, gradients, activations, logits and loss, or workspace."""
    weights = {b for b, label in trace.inputs.items() if label.startswith(("weights", "params"))}
    kinds: dict[int, str] = {}
    head = max((i for i, op in enumerate(ops) if op.scope == "head"), default=len(ops))
    used: dict[int, int] = {}
    for i, op in enumerate(ops):
        for b in op.reads:
            used[b] = i
    for op in ops:
        if op.reads and all(b in weights for b in op.reads) and op.kind in ("pointwise", "collective", "view", "opaque"):
            weights.update(op.makes)
            kinds.update(dict.fromkeys(op.makes, "gathered weights"))
            continue
        for b in op.makes:
            if op.scope == "head":
                kinds[b] = "logits and loss"
            elif op.scope in ("embed", "block") and used.get(b, 0) > head:
                kinds[b] = "activations"
            else:
                kinds[b] = "workspace"
    grads = {b for b, label in trace.outputs.items() if label.startswith("gradients")}
    for op in reversed(ops):
        if any(b in grads for b in op.makes) and op.kind in ("pointwise", "collective", "opaque") and op.scope in ("backward", "again"):
            grads.update(b for b in op.reads if kinds.get(b) == "workspace")
    return {**kinds, **dict.fromkeys(grads, "gradients")}


def _rounded(trace: Trace) -> dict[int, int]:
    return {b: -(-n // BLOCK) * BLOCK for b, n in trace.sizes.items()}


def _next_kernel(places: Sequence[int], count: int) -> list[int]:
    """Map every operation to the first kernel at or after it."""
    after = [0] * (count + 1)
    at = len(places)
    after[count] = at
    for i in range(count - 1, -1, -1):
        if at > 0 and places[at - 1] >= i:
            at -= 1
        after[i] = at
    return after
