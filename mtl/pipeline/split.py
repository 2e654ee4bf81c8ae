"""Which layers a stage has: the split that a table takes the least time with, where the head and the embedding are work too."""

from collections.abc import Sequence

from mtl.errors import UserError
from mtl.pipeline.simulate import Costs, simulate
from mtl.pipeline.table import Table

EFFORT = 300_000
"""At most so many actions are simulated to find a split: about a second."""
GAIN = 0.002
"""A split must be faster by this share to be taken for another."""


def split_layers(
    layers: int, stages: int, head: float, embed: float, given: Sequence[int] | None = None, table: Table | None = None
) -> tuple[tuple[int, ...], ...]:
    """Give each stage its layers, in order.

    Without ``given`` numbers the slowest stage is made as fast as can be, where the head costs as much as ``head`` layers and the
    embedding as ``embed``; with a table, stages then have a layer more or less where that takes less time by simulation.
    """
    if given is not None:
        if len(given) != stages or sum(given) != layers or min(given) < 1:
            raise UserError(
                f"--pipeline.layers-per-stage is {' '.join(str(n) for n in given)}: expected {stages} numbers (one a stage), each at least "
                f"1, whose sum is the model's {layers} layers; their sum is {sum(given)}."
            )
        counts = list(given)
    else:
        if layers < stages:
            raise UserError(
                f"--model.layers is {layers}, which do not split over the pipeline's {stages} stages (devices x virtual stages): each "
                "needs at least 1. Use fewer stages (--mesh.pipe, --pipeline.virtual) or more layers."
            )
        counts = _even(layers, stages, head, embed)
        counts = counts if table is None else _faster(table, counts, head, embed)
    starts = [sum(counts[:s]) for s in range(stages)]
    return tuple(tuple(range(start, start + n)) for start, n in zip(starts, counts, strict=True))


def costs(counts: Sequence[int], head: float, embed: float) -> Costs:
    """Weigh stages by their layers, the first by the embedding too and the last by the head."""
    work = [float(n) for n in counts]
    work[0] += embed
    work[-1] += head
    return Costs(work=tuple(work))


def _even(layers: int, stages: int, head: float, embed: float) -> list[int]:
    counts = [1] * stages
    for _ in range(layers - stages):
        work = costs(counts, head, embed).work
        counts[min(range(stages), key=lambda s: (work[s], s))] += 1
    return counts


def _faster(table: Table, start: list[int], head: float, embed: float) -> list[int]:
    """Move layers from stage to stage, each stage keeping its number to within one, as long as the table ends sooner for it.

    What is slow need not be the largest stage: a device may have several, and the first and last stages wait least. No device may store
    more than the fullest did before.
    """
    found, (least, room) = start, _time_and_room(table, start, head, embed)
    moves = [(a, b) for a in range(len(start)) for b in range(len(start)) if a != b]
    tries = EFFORT // sum(len(row) for row in table.rows)
    i, since = 0, 0
    while since < len(moves) and tries > 0:
        a, b = moves[i % len(moves)]
        i, since = i + 1, since + 1
        counts = [n - (s == a) + (s == b) for s, n in enumerate(found)]
        if counts[a] < max(1, start[a] - 1) or counts[b] > start[b] + 1:
            continue
        tries -= 1
        time, stored = _time_and_room(table, counts, head, embed)
        if time < least * (1 - GAIN) and stored <= room:
            found, least, since = counts, time, 0
    return found


def _time_and_room(table: Table, counts: Sequence[int], head: float, embed: float) -> tuple[float, int]:
    """Simulate a split: how long a step takes, and how many layers' activations the fullest device stores at most."""
    timeline = simulate(table, costs(counts, head, embed))
    room = [0] * table.devices
    for stage, most in timeline.stored_by_stage.items():
        room[table.place[stage]] += most * counts[stage]
    return timeline.length, max(room)
