"""Builders of tables: from numbers of devices, micro-batches and virtual stages to a schedule. All are pure functions of integers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from mtl.errors import UserError, unknown
from mtl.pipeline.simulate import simulate
from mtl.pipeline.table import Action, Table, parse

Rows = tuple[tuple[Action, ...], ...]


def gpipe(devices: int, microbatches: int, virtual: int = 1) -> Rows:
    """All forwards, then all backwards. Stores every micro-batch."""
    micros = range(microbatches)
    return tuple((*(Action(d, "F", m) for m in micros), *(Action(d, "B", m) for m in micros)) for d in range(devices))


def one_forward_one_backward(devices: int, microbatches: int, virtual: int = 1) -> Rows:
    """As many forwards ahead as there are stages behind, then a backward for each forward. Device d stores at most p - d."""
    return interleaved(devices, microbatches, 1)


def interleaved(devices: int, microbatches: int, virtual: int) -> Rows:
    """1F1B with ``virtual`` stages on every device, dealt out in turn: device d holds stages d, d + p, d + 2 p, ...

    Micro-batches go in rounds of at least p: all of a round through one virtual stage, then through the next.
    """
    count = max(1, microbatches // devices)
    sizes = [microbatches // count + (i < microbatches % count) for i in range(count)]

    def order(turns: range) -> list[tuple[int, int]]:
        firsts = [sum(sizes[:i]) for i in range(count)]
        return [(v, m) for first, size in zip(firsts, sizes, strict=True) for v in turns for m in range(first, first + size)]

    forward, backward = order(range(virtual)), order(range(virtual - 1, -1, -1))
    rows: list[tuple[Action, ...]] = []
    for d in range(devices):
        ahead = 2 * (devices - 1 - d) + (virtual - 1) * sizes[0] if virtual > 1 else devices - 1 - d
        ahead = min(ahead, len(forward))
        row = [Action(v * devices + d, "F", m) for v, m in forward[:ahead]]
        for i, (v, m) in enumerate(backward):
            row += [Action(w * devices + d, "F", n) for w, n in forward[ahead + i : ahead + i + 1]]
            row.append(Action(v * devices + d, "B", m))
        rows.append(tuple(row))
    return tuple(rows)


def zb_h1(devices: int, microbatches: int, virtual: int = 1) -> Rows:
    """1F1B with weights' gradients apart: device d puts off d of them to fill its bubble, and stores no more than 1F1B's first device.

    After Qi et al., "Zero Bubble Pipeline Parallelism" (2023).
    """
    rows: list[tuple[Action, ...]] = []
    for d in range(devices):
        ahead = min(devices - d, microbatches)
        row = [Action(d, "F", m) for m in range(ahead)]
        for m in range(microbatches):
            row.append(Action(d, "B", m))
            row += [Action(d, "W", m - d)] if m >= d else []
            row += [Action(d, "F", ahead + m)] if ahead + m < microbatches else []
        row += [Action(d, "W", m) for m in range(max(0, microbatches - d), microbatches)]
        rows.append(tuple(row))
    return tuple(rows)


def zb_v(devices: int, microbatches: int, virtual: int = 2) -> Rows:
    """Two stages a device in the shape of a V: device d holds stages d and 2 p - 1 - d, so the first device has the loss too.

    With equal costs almost no bubble is left, and a device stores at most 2 p halves of its layers, as 1F1B's first device does.
    After Qi et al., "Pipeline Parallelism with Controllable Memory" (2024).
    """
    full = max(microbatches, 2 * devices - 1)  # fewer micro-batches are the same schedule with the rest left out
    rows: list[tuple[Action, ...]] = []
    for d in range(devices):
        row: list[Action] = []
        count: dict[tuple[int, str], int] = {}
        down, up = d, 2 * devices - 1 - d

        def do(stage: int, kinds: str, row: list[Action] = row, count: dict[tuple[int, str], int] = count) -> None:
            for kind in kinds:
                micro = count.get((stage, kind), 0)
                if micro < (full if kind == "F" else count.get((stage, {"B": "F", "W": "B"}[kind]), 0)):
                    row.append(Action(stage, kind, micro))
                    count[stage, kind] = micro + 1

        for _ in range(2 * (devices - d) - 1):
            do(down, "F")
        for _ in range(d):
            do(up, "F")
            do(down, "F")
        for _ in range(devices - d):
            do(up, "FBW")
        while count[up, "F"] < full:
            do(down, "FBW")
            do(up, "FBW")
        for _ in range(d):
            do(down, "B")
            do(up, "B")
        for _ in range(devices - d):
            do(down, "BW")
        for stage in (up, down):
            while count.get((stage, "W"), 0) < full:
                do(stage, "W")
        rows.append(tuple(action for action in row if action.micro < microbatches))
    return tuple(rows)


BUILDERS: Mapping[str, Callable[[int, int, int], Rows]] = MappingProxyType(
    {"gpipe": gpipe, "1f1b": one_forward_one_backward, "interleaved": interleaved, "zb_h1": zb_h1, "zb_v": zb_v}
)


def build(schedule: str, devices: int, microbatches: int | None, virtual: int | None = None) -> Table:
    """Make a named schedule's table, or read one from a text file; refuse numbers that it cannot do, and what deadlocks.

    ``virtual`` is the number of stages a device, by default the schedule's own (2 for interleaved and zb_v). With None for
    ``microbatches`` a file's own number counts.
    """
    if devices < 1 or (microbatches is not None and microbatches < 1) or (virtual is not None and virtual < 1):
        numbers = {"devices": devices, "micro-batches": microbatches, "virtual stages": virtual}
        said = ", ".join(f"{n} {what}" for what, n in numbers.items() if n is not None)
        raise UserError(f"a pipeline of {said}: each must be at least 1.")
    if schedule not in BUILDERS:
        return _from_file(schedule, devices, microbatches, virtual)
    if microbatches is None:
        raise UserError(f"schedule {schedule} needs a number of micro-batches (--pipeline.microbatches).")
    own = 2 if schedule in ("interleaved", "zb_v") else 1
    virtual = own if virtual is None else virtual
    if schedule != "interleaved" and virtual != own:
        raise UserError(f"--pipeline.virtual is {virtual}, but schedule {schedule} has {own} a device. Leave it out, or use interleaved.")
    if schedule != "gpipe" and microbatches < devices:
        raise UserError(
            f"--pipeline.microbatches is {microbatches}: too few for schedule {schedule} over {devices} pipeline devices, which needs at "
            f"least {devices}. Use more (a larger global batch or smaller micro-batches), fewer devices, or schedule gpipe."
        )
    return Table(schedule, BUILDERS[schedule](devices, microbatches, virtual))


def _from_file(name: str, devices: int, microbatches: int | None, virtual: int | None) -> Table:
    path = Path(name)
    if not path.is_file():
        if path.suffix or "/" in name:
            raise UserError(f"--pipeline.schedule {name}: there is no such file.")
        raise unknown("--pipeline.schedule", name, (*BUILDERS, "a file"))
    try:
        table = parse(path.read_text("utf-8-sig"), name)  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--pipeline.schedule {name} cannot be read: {error}.") from None
    simulate(table)
    if table.devices != devices:
        raise UserError(f"--pipeline.schedule {name} has lines for {table.devices} devices, but the pipeline has {devices} (--mesh.pipe).")
    if microbatches is not None and table.microbatches != microbatches:
        raise UserError(
            f"--pipeline.schedule {name} has {table.microbatches} micro-batches, but a step has {microbatches} (--pipeline.microbatches)."
        )
    if virtual is not None and table.stages != virtual * devices:
        raise UserError(
            f"--pipeline.schedule {name} has {table.stages} stages on {devices} devices, but --pipeline.virtual {virtual} makes "
            f"{virtual * devices}. Leave --pipeline.virtual out."
        )
    return table


def forwards(place: Mapping[int, int], microbatches: int) -> Table:
    """Give forwards alone, each stage on the device that ``place`` says: what evaluation runs."""
    devices = range(max(place.values()) + 1)
    order = [[Action(stage, "F", m) for m in range(microbatches) for stage in place if place[stage] == device] for device in devices]
    # in order of the earliest moment at which each can run, so that no device waits for what another puts off
    return Table("forwards", tuple(tuple(sorted(row, key=lambda a: (a.micro + a.stage, a.stage))) for row in order))
