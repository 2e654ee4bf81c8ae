"""The loop: take a batch, take a step, tell the hooks. It owns no state and knows no model."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from mtl.errors import UserError
from mtl.train.step import Step

Hook = Callable[[int, Any, dict[str, Any]], None]
"""``hook(step, state, record)`` after every step; the record may be added to, and the hooks that follow see it."""


class TrainingStopped(UserError):
    """A run that cannot go on: its loss or gradient is not finite."""


def fit(state: Any, step: Step, batch_at: Callable[[int], Any], steps: range, hooks: Sequence[Hook]) -> Any:
    """Run steps; ``batch_at(i)`` gives the batch of step i. Batches are made while the device works."""
    batch: Any = batch_at(steps.start) if len(steps) else None
    for i in steps:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        batch = batch_at(i + 1) if i + 1 in steps else None
        record: dict[str, Any] = {"step": i + 1, **{name: value.tolist() for name, value in metrics.items()}}
        record["step_time"] = time.perf_counter() - start
        check_finite(record)
        for hook in hooks:
            hook(i + 1, state, record)
    return state


def check_finite(record: dict[str, Any]) -> None:
    """Stop where the step was not good, and say which micro-batch. (Every device has the same numbers, so all stop.)"""
    if record["good"]:
        return
    bad = [i for i, loss in enumerate(record["losses"]) if loss - loss != 0.0]
    if not bad and record.get("loss_scale", 1.0) > 1.0:
        return  # fp16: the gradient overflowed, the step was skipped and the loss scale halved
    what = f"the loss of micro-batch {bad[0]} is {record['losses'][bad[0]]}" if bad else f"the gradient norm is {record['grad_norm']}"
    raise TrainingStopped(
        f"step {record['step']}: {what}. The state after step {record['step'] - 1} is untouched. "
        "A lower --optim.lr, more --optim.warmup-steps or a wider --precision may help."
    )
