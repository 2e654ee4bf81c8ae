"""Tables: what every device of a pipeline does, in order. `2F0` is stage 2, forward, micro-batch 0; a table has one line a device.

Kinds are F (forward), B (backward) and W (gradients of weights). Where a stage has W for a micro-batch, its B gives the gradient of the
stage's input alone; where it has none, B gives both.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mtl.errors import UserError

_SPELLING = re.compile(r"(\d+)([FBW])(\d+)")


class Action(NamedTuple):
    """One thing a device does: a kind of work of one stage on one micro-batch."""

    stage: int
    kind: str
    micro: int

    def __str__(self) -> str:
        """Spell it: ``2F0``."""
        return f"{self.stage}{self.kind}{self.micro}"


@dataclass(frozen=True)
class Table:
    """A schedule: ``rows[d]`` are the actions of device d, in order."""

    name: str
    rows: tuple[tuple[Action, ...], ...]

    @functools.cached_property
    def place(self) -> Mapping[int, int]:
        """Say on which device each stage lives."""
        return {action.stage: device for device, row in enumerate(self.rows) for action in row}

    @property
    def devices(self) -> int:
        """Count the devices."""
        return len(self.rows)

    @property
    def stages(self) -> int:
        """Count the stages; there are as many or more than devices."""
        return len(self.place)

    @functools.cached_property
    def microbatches(self) -> int:
        """Count the micro-batches."""
        return len({action.micro for row in self.rows for action in row})

    @functools.cached_property
    def split(self) -> frozenset[tuple[int, int]]:
        """List the (stage, micro-batch) pairs whose gradients of weights are an action of their own."""
        return frozenset((a.stage, a.micro) for row in self.rows for a in row if a.kind == "W")

    def on(self, device: int) -> tuple[int, ...]:
        """List the stages of a device in order."""
        return tuple(sorted(stage for stage, where in self.place.items() if where == device))

    def needs(self, action: Action) -> Action | None:
        """Give the action of another stage (or, for the last stage's backward, of its own) that must come before this one."""
        stage, kind, micro = action
        if kind == "F":
            return Action(stage - 1, "F", micro) if stage else None
        if kind == "B":
            return Action(stage + 1, "B", micro) if stage + 1 < self.stages else Action(stage, "F", micro)
        return Action(stage, "B", micro)

    def goal(self, action: Action) -> Action | None:
        """Give the action of another stage that the result of this one goes to: what `needs` is to it."""
        stage, kind, micro = action
        if kind == "F":
            return Action(stage + 1, "F", micro) if stage + 1 < self.stages else None
        return Action(stage - 1, "B", micro) if kind == "B" and stage else None

    def messages(self) -> dict[tuple[int, int], list[Action]]:
        """List what each device sends to each other one, by the actions that it goes to, in the order in which it is made."""
        found: dict[tuple[int, int], list[Action]] = {}
        for source, row in enumerate(self.rows):
            for action in row:
                goal = self.goal(action)
                if goal is not None and self.place[goal.stage] != source:
                    found.setdefault((source, self.place[goal.stage]), []).append(goal)
        return found

    def frees(self, action: Action) -> bool:
        """Tell whether an action is the last to need what its stage stored of its micro-batch."""
        return action.kind == ("W" if (action.stage, action.micro) in self.split else "B")

    def __str__(self) -> str:
        """Spell it, one line a device: what `parse` reads."""
        return "\n".join(" ".join(str(action) for action in row) for row in self.rows)


@functools.lru_cache(maxsize=64)
def after(table: Table, device: int) -> Mapping[Action, int]:
    """Say of every action how many of ``device``'s own actions must be done before it can be, through whatever it needs."""
    found: dict[Action, int] = {}
    at, moved = [0] * table.devices, True
    while moved:
        moved = False
        for d, row in enumerate(table.rows):
            while at[d] < len(row) and ((need := table.needs(row[at[d]])) is None or need in found):
                before = found[row[at[d] - 1]] if at[d] else 0
                at[d], moved = at[d] + 1, True
                found[row[at[d] - 1]] = at[d] if d == device else max(before, 0 if need is None else found[need])
    return found


def parse_action(text: str, where: str) -> Action:
    """Read ``2F0``; ``where`` begins the error."""
    found = _SPELLING.fullmatch(text)
    if found is None:
        raise UserError(f"{where}: {text!r} is no action. Expected stage, kind (F, B or W) and micro-batch, such as 2F0.")
    return Action(int(found[1]), found[2], int(found[3]))


def parse(text: str, name: str) -> Table:
    """Read a table: one line a device, actions apart by spaces or commas; what follows # and empty lines do not count. It is checked."""
    rows: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if words:
            rows.append(tuple(parse_action(word, f"schedule {name!r}, line {number}") for word in words))
    table = Table(name, tuple(rows))
    check(table)
    return table


def check(table: Table) -> None:
    """Refuse a table in which something is missing, done twice, or done on a device before it can be. (Deadlock: see `simulate`.)"""
    start = f"schedule {table.name!r}"
    if not any(table.rows):
        raise UserError(f"{start} has no actions: expected one line a device, such as 0F0 0B0.")
    done: dict[Action, int] = {}
    for device, row in enumerate(table.rows):
        if not row:
            raise UserError(f"{start}: device {device} has no actions; every device holds at least one stage.")
        for action in row:
            _check_action(table, start, done, action, device)
    stages, micros = {a.stage for a in done}, {a.micro for a in done}
    for what, numbers in (("stage", stages), ("micro-batch", micros)):
        lacking = _gap(numbers)
        if lacking is not None:
            raise UserError(f"{start} has {what} {max(numbers)} but nothing of {what} {lacking}: they are numbered from 0 without gaps.")
    for stage in sorted(stages):
        for micro in sorted(micros):
            for kind in ("F", "B"):
                if Action(stage, kind, micro) not in done:
                    raise UserError(
                        f"{start}: {Action(stage, kind, micro)} is missing; every micro-batch goes forward and backward once a stage."
                    )


def _check_action(table: Table, start: str, done: dict[Action, int], action: Action, device: int) -> None:
    stage, kind, micro = action
    if action in done:
        raise UserError(f"{start}: {action} stands twice, on device {done[action]} and on device {device}.")
    if table.place[stage] != device:
        raise UserError(
            f"{start}: {action} is on device {device}, but stage {stage} is on device {table.place[stage]} too; it lives on one."
        )
    earlier = {"F": None, "B": "F", "W": "B"}[kind]
    if earlier is not None and Action(stage, earlier, micro) not in done:
        raise UserError(f"{start}: on device {device} {action} comes before {Action(stage, earlier, micro)}, which it needs.")
    done[action] = device


def _gap(numbers: Iterable[int]) -> int | None:
    numbers = set(numbers)
    return next((n for n in range(len(numbers)) if n not in numbers), None)
