"""A simulator of tables in plain Python: when each action runs, where it stops for ever, how much time is lost, how much is stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mtl.errors import UserError
from mtl.pipeline.table import Action, Table


@dataclass(frozen=True)
class Costs:
    """Times of one stage's forward, gradient of its input, gradient of its weights, and of sending between devices.

    ``work`` makes stages unequal: each stage's times are multiplied by its number there. ``stages`` gives each stage its own times: of F,
    of B, of I (a B that leaves the weights' gradients to W) and of W.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    send: float = 0.0
    work: tuple[float, ...] = ()
    stages: tuple[Mapping[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse times that are none."""
        for name in ("forward", "backward", "weight", "send"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "forward" and not value):
                raise UserError(f"--costs.{name} is {value}: a time must be finite and not negative, and that of forward above 0.")

    def of(self, action: Action, split: bool) -> float:
        """Give the time of an action; a backward that is not split does the weights' part too."""
        if self.stages:
            return self.stages[action.stage]["I" if split and action.kind == "B" else action.kind]
        own = {"F": self.forward, "B": self.backward if split else self.backward + self.weight, "W": self.weight}[action.kind]
        return own * (self.work[action.stage] if self.work else 1.0)


class Span(NamedTuple):
    """One action on one device, from ``start`` to ``end``."""

    device: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a simulation (or a measurement) found: spans by device, in order."""

    name: str
    spans: tuple[tuple[Span, ...], ...]
    stored: tuple[int, ...] = ()
    """The most activations (of one stage for one micro-batch) that each device stores at once."""
    stored_by_stage: Mapping[int, int] = field(default_factory=dict[int, int])

    @property
    def length(self) -> float:
        """Give the time from the first start to the last end."""
        ends = [span.end for row in self.spans for span in row]
        return max(ends) - min(span.start for row in self.spans for span in row)

    @property
    def bubble(self) -> float:
        """Give the share of all devices' time in which they have nothing to do."""
        busy = sum(span.end - span.start for row in self.spans for span in row)
        return 1.0 - busy / (self.length * len(self.spans))


def simulate(table: Table, costs: Costs | None = None) -> Timeline:
    """Run a table on paper. A table that comes to a stand is an error that names the actions."""
    costs = costs or Costs()
    given = len(costs.work or costs.stages)
    if given not in (0, table.stages):
        raise UserError(f"costs give work for {given} stages, but schedule {table.name!r} has {table.stages}.")
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in table.rows]
    clock, place = [0.0] * table.devices, [0] * table.devices
    moved = True
    while moved:
        moved = False
        for device, row in enumerate(table.rows):
            while place[device] < len(row):
                action = row[place[device]]
                need = table.needs(action)
                if need is not None and need not in ends:
                    break
                away = need is not None and table.place[need.stage] != device
                start = max(clock[device], 0.0 if need is None else ends[need] + (costs.send if away else 0.0))
                end = start + costs.of(action, (action.stage, action.micro) in table.split)
                spans[device].append(Span(device, action, start, end))
                ends[action] = clock[device] = end
                place[device] += 1
                moved = True
    stuck = [(d, row[place[d]]) for d, row in enumerate(table.rows) if place[d] < len(row)]
    if stuck:
        waits = "; ".join(f"device {d} at {action}, which waits for {table.needs(action)}" for d, action in stuck)
        raise UserError(f"schedule {table.name!r} deadlocks: {waits}.")
    by_device, by_stage = _stored(table)
    return Timeline(table.name, tuple(tuple(row) for row in spans), by_device, by_stage)


def _stored(table: Table) -> tuple[tuple[int, ...], dict[int, int]]:
    """Count what is stored: from a stage's forward to the last action that needs it. The order on a device decides, not the clock."""
    by_device: list[int] = []
    by_stage: dict[int, int] = {}
    for row in table.rows:
        live: dict[int, int] = {}
        most = 0
        for action in row:
            if action.kind == "F":
                live[action.stage] = live.get(action.stage, 0) + 1
                by_stage[action.stage] = max(by_stage.get(action.stage, 0), live[action.stage])
                most = max(most, sum(live.values()))
            elif table.frees(action):
                live[action.stage] -= 1
        by_device.append(most)
    return tuple(by_device), by_stage


def closed_bubble(devices: int, microbatches: int, virtual: int = 1) -> float:
    """Give the bubble of 1F1B and of interleaved 1F1B where sending is free: (p - 1) / (v m + p - 1)."""
    return (devices - 1) / (virtual * microbatches + devices - 1)
