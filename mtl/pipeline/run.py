"""The interpreter: runs a device's row of any table."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from mtl.pipeline.links import Traffic
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


def run(table: Table, device: int, work: Work, traffic: Traffic, mark: Mark | None = None) -> int:
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
        goal = traffic.goal(action)
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
