"""The interpreter: runs a device's row of any table."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mtl.pipeline.table import Action, Table

Mark = Callable[[Action, bool], None]
"""``mark(action, ended)`` is called before and after each action."""


class Work(Protocol):
    """What the stages of a device can do for one step's micro-batches. ``x`` is None for the first stage, ``grad`` for the last."""

    def forward(self, stage: int, micro: int, x: Tensor | None) -> tuple[Tensor | None, Any]:
        """Give the stage's result (None where nothing follows) and what backward needs."""
        ...

    def backward(self, saved: Any, grad: Tensor | None) -> Tensor | None:
        """Add up gradients of weights; give that of the stage's input."""
        ...

    def inputs(self, saved: Any, grad: Tensor | None) -> tuple[Tensor | None, Any]:
        """Give the gradient of the stage's input, and what the weights' need."""
        ...

    def weights(self, saved: Any) -> None:
        """Add up gradients of weights."""
        ...


class Messages(Protocol):
    """One step's messages between this device's stages and the others', by the actions that need them."""

    def send(self, x: Tensor, goal: Action) -> None:
        """Send a result on its way."""
        ...

    def receive(self, goal: Action) -> Tensor:
        """Give what an action needs, once it is here."""
        ...

    def release(self, buffer: Tensor) -> None:
        """Take back what was received, used by nobody any more."""
        ...

    def launched(self, actions: int) -> None:
        """Hear how many of the device's actions have been launched."""
        ...

    def finish(self) -> None:
        """Wait until everything was sent."""
        ...


def warm_up(table: Table, device: int, work: Work, x: Tensor) -> None:
    """Run each of a device's stages once on ``x``, without messages: what is compiled, loaded or tried out in a first run is done alone.

    Amid messages whatever waits for the whole GPU would wait for other devices, and they for this one.
    """
    for stage in table.on(device):
        _, saved = work.forward(stage, 0, x if stage else None)
        grad = x if stage + 1 < table.stages else None
        if any(stage == other for other, _ in table.split):
            _, saved = work.inputs(saved, grad)
            work.weights(saved)
        else:
            work.backward(saved, grad)
    if x.device.type != "cpu":
        torch.accelerator.synchronize()


def run(table: Table, device: int, work: Work, traffic: Messages, mark: Mark | None = None) -> int:
    """Run a device's row. Gives the most activations that were stored at once."""
    stored: dict[tuple[int, int], Any] = {}
    buffers: dict[tuple[int, int], list[Tensor]] = {}
    here: dict[Action, Tensor] = {}
    peak = 0

    def take(action: Action) -> Tensor:
        """Fetch what another stage made for an action."""
        if action in here:
            return here.pop(action)
        x = traffic.receive(action)
        buffers.setdefault((action.stage, action.micro), []).append(x)
        return x

    def give(action: Action, x: Tensor | None) -> None:
        """Hand a result to the stage that waits for it."""
        goal = table.goal(action)
        if goal is None:
            return
        assert x is not None
        if table.place[goal.stage] == device:
            here[goal] = x
        else:
            traffic.send(x, goal)

    for launched, action in enumerate(table.rows[device], 1):
        stage, kind, micro = action
        key = (stage, micro)
        given = take(action) if kind != "W" and stage != (0 if kind == "F" else table.stages - 1) else None
        if mark is not None:
            mark(action, False)
        if kind == "F":
            x, saved = work.forward(stage, micro, given)
            if saved is not None:
                stored[key] = saved
                peak = max(peak, len(stored))
            give(action, x)
        elif kind == "W":
            work.weights(stored.pop(key))
        elif key in table.split:
            x, stored[key] = work.inputs(stored[key], given)
            give(action, x)
        else:
            give(action, work.backward(stored.pop(key), given))
        if mark is not None:
            mark(action, True)
        if key not in stored:
            for buffer in buffers.pop(key, ()):
                traffic.release(buffer)
        traffic.launched(launched)
    traffic.finish()
    return peak
