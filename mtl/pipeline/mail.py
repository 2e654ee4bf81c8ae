"""Messages between the stages of a pipeline by the copy engines of one host's GPUs: nothing is posted, and nobody waits but streams."""

from collections import deque

import torch
from torch import Tensor

from mtl.kernels.mailbox import Mailbox
from mtl.pipeline.table import Action, Table

SLOTS = 4
"""Messages of one device that another has room for, unless a table needs more."""


class Mail:
    """The messages of one run of a table."""

    def __init__(self, box: Mailbox, table: Table, device: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make room for messages of one shape."""
        self._box, self._place, self._form = box, table.place, (shape, dtype)
        self._coming = {source: deque(goals) for (source, to), goals in table.messages().items() if to == device}
        self._source = {goal: source for source, goals in self._coming.items() for goal in goals}
        self._here: dict[Action, Tensor] = {}
        box.open(slots(table), torch.Size(shape).numel() * dtype.itemsize)

    def send(self, x: Tensor, goal: Action) -> None:
        """Send a result on its way."""
        self._box.send(x, self._place[goal.stage])

    def receive(self, goal: Action) -> Tensor:
        """Take what an action needs, and before it what its sender made earlier: so slots are free in the order in which they are used."""
        source = self._source[goal]
        while goal not in self._here:
            self._here[self._coming[source].popleft()] = self._box.take(source, *self._form)
        return self._here.pop(goal)

    def release(self, buffer: Tensor) -> None:
        """Do nothing: a message was copied out of its slot."""

    def launched(self, actions: int) -> None:
        """Do nothing: there are no receives to post."""

    def finish(self) -> None:
        """Do nothing: a message that was sent has a copy of its own."""


def slots(table: Table) -> int:
    """Find with how many slots a channel no device ever waits for one that another cannot free before."""
    most = max((len(goals) for goals in table.messages().values()), default=0)
    return next((n for n in range(SLOTS, most) if _passes(table, n)), max(most, 1))


def _passes(table: Table, room: int) -> bool:
    """Run a table on paper, with ``room`` messages a channel on their way at most."""
    messages = table.messages()
    number = {goal: (channel, i) for channel, goals in messages.items() for i, goal in enumerate(goals)}
    sent, taken = dict.fromkeys(messages, 0), dict.fromkeys(messages, 0)
    done, at, moved = set[Action](), [0] * table.devices, True
    while moved:
        moved = False
        for d, row in enumerate(table.rows):
            while at[d] < len(row):
                action, goal = row[at[d]], table.goal(row[at[d]])
                if action in number:  # what was sent earlier is taken out while this is waited for
                    channel, i = number[action]
                    moved = moved or taken[channel] < min(i + 1, sent[channel])
                    taken[channel] = max(taken[channel], min(i + 1, sent[channel]))
                if (need := table.needs(action)) is not None and need not in done:
                    break
                if goal is not None and goal in number:
                    channel, i = number[goal]
                    if i >= taken[channel] + room:
                        break
                    sent[channel] = i + 1
                done.add(action)
                at[d], moved = at[d] + 1, True
    return all(at[d] == len(row) for d, row in enumerate(table.rows))
