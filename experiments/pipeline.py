"""Draw a pipeline's schedule: `python experiments/pipeline.py show --schedule 1f1b --stages 4 --microbatches 8 --out FILE.svg`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mtl.errors import UserError
from mtl.pipeline.draw import write
from mtl.pipeline.schedules import build
from mtl.pipeline.simulate import Costs, Span, Timeline, simulate
from mtl.pipeline.table import parse_action
from mtl.runtime import process


@dataclass(frozen=True)
class Show:
    """Simulate a schedule, print what it costs, and draw it; with --run, the times measured in a run under it."""

    schedule: str
    """gpipe, 1f1b, interleaved, zb_h1, zb_v, or a text file with one line a device."""
    stages: int | None = None
    """Devices of the pipeline; a file's own number by default."""
    microbatches: int | None = None
    """Micro-batches a step; a file's own number by default."""
    virtual: int | None = None
    """Stages a device; by default the schedule's own."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The picture: a name that ends in .svg or .png. Without one, the numbers alone are printed."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder of a run with a pipeline, which writes pipeline.jsonl: its last recorded step is drawn under the simulation."""
    table: bool = False
    """Print the table too."""
    costs: Costs = field(default_factory=Costs)


def main() -> None:
    """Read the command and draw."""
    words = process.command_line()
    if not words or words[0] not in ("show", "-h", "--help"):
        raise UserError(f"experiments/pipeline.py got {' '.join(words)!r}: expected the command show. show --help lists its flags.")
    show(tyro.cli(Show, args=words[1:] if words[0] == "show" else words, prog="pipeline.py show", config=(tyro.conf.AvoidSubcommands,)))


def show(wanted: Show) -> None:
    """Simulate, print and draw."""
    devices = wanted.stages if wanted.stages is not None else _devices(wanted.schedule)
    try:
        table = build(wanted.schedule, devices, wanted.microbatches, wanted.virtual)
    except UserError as error:  # which names the flags of a run
        raise UserError(str(error).replace("--mesh.pipe", "--stages").replace("--pipeline.", "--")) from None
    timelines = [simulate(table, wanted.costs)]
    found = timelines[0]
    print(f"{table.name}: {table.devices} devices, {table.stages} stages, {table.microbatches} micro-batches")
    print(f"time {found.length:g}, bubble {found.bubble:.4f}")
    print(f"stored activations at most, by device: {' '.join(str(n) for n in found.stored)}")
    print(f"stored activations at most, by stage: {' '.join(str(found.stored_by_stage[s]) for s in range(table.stages))}")
    if wanted.table:
        print(table)
    if wanted.run is not None:
        timelines.append(measured(wanted.run))
        print(f"measured: time {timelines[1].length:.4g} s, bubble {timelines[1].bubble:.4f}")
    if wanted.out is not None:
        write(timelines, wanted.out)
        print(f"drawn: {wanted.out}")


def measured(folder: Path) -> Timeline:
    """Read the last step's times from a run folder: one object a step with name, step and rows of [action, start, end]."""
    path = folder / "pipeline.jsonl"
    try:
        last = json.loads(path.read_text().splitlines()[-1])
        rows = [[(parse_action(text, str(path)), start, end) for text, start, end in row] for row in last["rows"]]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--run {folder}: cannot read {path}: {error}. Runs with --mesh.pipe write it.") from None
    spans = tuple(tuple(Span(d, action, start, end) for action, start, end in row) for d, row in enumerate(rows))
    return Timeline(f"measured, step {last['step']} (seconds)", spans)


def _devices(schedule: str) -> int:
    """Count the lines of a file, or ask for the number."""
    try:
        lines = sum(1 for line in Path(schedule).read_text().splitlines() if line.partition("#")[0].strip())
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--schedule {schedule} needs --stages, the number of devices (or names a file that cannot be read).") from None
    if not lines:
        raise UserError(f"--schedule {schedule} has no actions: expected one line a device, such as 0F0 0B0.")
    return lines


if __name__ == "__main__":
    process.guarded(main)
