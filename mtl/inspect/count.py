"""Counts of a step: products, attention and collectives, exact, from records of one and two rounds of layers."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from mtl.inspect.record import Op, Trace
from mtl.sharding.layout import Axes

Key = tuple[str, Axes]


@dataclass
class Counts:
    """How often, and how much. Collectives are keyed by (name, axes); their bytes are those of the larger side."""

    matmuls: int = 0
    matmul_flops: int = 0
    attention_flops: int = 0
    times: dict[Key, int] = field(default_factory=dict[Key, int])
    bytes: dict[Key, int] = field(default_factory=dict[Key, int])

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        """Add ``times`` the other."""
        keys = dict.fromkeys((*self.times, *other.times))
        return Counts(
            self.matmuls + times * other.matmuls,
            self.matmul_flops + times * other.matmul_flops,
            self.attention_flops + times * other.attention_flops,
            {k: v for k in keys if (v := self.times.get(k, 0) + times * other.times.get(k, 0))},
            {k: v for k in keys if (v := self.bytes.get(k, 0) + times * other.bytes.get(k, 0))},
        )


def count(ops: Iterable[Op]) -> Counts:
    """Count a list of operations."""
    found = Counts()
    for op in ops:
        if op.kind == "matmul":
            found.matmuls += 1
            found.matmul_flops += op.flops
        elif op.kind == "attention":
            found.attention_flops += op.flops
        if op.wire is not None:
            key = (op.wire.collective, op.wire.axes)
            found.times[key] = found.times.get(key, 0) + 1
            found.bytes[key] = found.bytes.get(key, 0) + op.wire.bytes
    return found


def needed(trace: Trace) -> list[Op]:
    """Drop what a compiler drops: operations whose results nothing uses. A wait is never dropped, nor what it waits for."""
    wanted = set(trace.outputs)
    kept: list[Op] = []
    for op in reversed(trace.ops):
        if op.kind == "wait" or any(i in wanted for i in (*op.makes, *op.writes)) or (op.kind == "view" and wanted & {*op.reads}):
            kept.append(op)
            wanted.update(op.reads)
    return kept[::-1]


def extrapolate(few: Counts, more: Counts, rounds: int) -> Counts:
    """Give the counts of ``rounds`` more rounds of layers than in ``few``, from ``few`` and one round more."""
    return few.plus(more.plus(few, -1), rounds)
