"""The loop: take a batch, take a step, tell the hooks. It owns no state and knows no model."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl.errors import UserError
from mtl.train.step import Step

Hook = Callable[[int, Any, dict[str, Any]], None]
"""``hook(step, state, record)`` after every step; the record may be added to, and the hooks that follow see it."""


class TrainingStopped(UserError):
    """A run that cannot go on: its loss or gradient is not finite."""


class Behind:
    """Lets a step be told of while the device computes the gradient of the next, so that it does not wait for the host between two steps.

    A step whose `StepOptions.under_way` is `settle` tells there of the step before: until its update the state is as that one left it, so
    hooks see, save and stop the same as without. ``may_wait(i)`` says whether that is wanted after step i: not where a hook keeps the
    device busy, or where the next step compiles.
    """

    def __init__(self, may_wait: Callable[[int], bool] = lambda i: False) -> None:
        """Wait with nothing, unless ``may_wait`` says so."""
        self._may_wait = may_wait
        self._tell: Callable[[], None] | None = None

    def leave(self, i: int, tell: Callable[[], None]) -> None:
        """Take what is to be told of step i: at once, or when the next gradient is under way."""
        self.settle()  # for a step that does not
        self._tell = tell
        if not self._may_wait(i):
            self.settle()

    def settle(self) -> None:
        """Tell what waits to be told."""
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()

    def waits(self) -> bool:
        """Say whether something waits to be told."""
        return self._tell is not None


def fit(
    state: Any, step: Step, batch_at: Callable[[int], Any], steps: range, hooks: Sequence[Hook], behind: Behind | None = None
) -> Any:  # fmt: skip
    """Run steps; ``batch_at(i)`` gives the batch of step i. Batches are made while the device works, and with ``behind`` hooks run then."""
    behind = behind or Behind()
    end = Moment(None)  # of the step before, or of what its hooks did

    def tell(i: int, state: Any, begun: Moment, metrics: dict[str, Tensor], ended: Moment) -> None:
        ended.wait()
        record: dict[str, Any] = {"step": i, **{name: value.tolist() for name, value in metrics.items()}}
        record["step_time"] = begun.until(ended)
        check_finite(record)
        for hook in hooks:
            hook(i, state, record)

    batch: Any = batch_at(steps.start) if len(steps) else None
    for i in steps:
        begun = end if behind.waits() else Moment(end.device)
        try:
            state, metrics = step(state, batch)
        except Exception:
            behind.settle()  # the step before was a good one, or says itself that it was not
            raise
        # On their way already, so that to read them is not to wait for what the device is told to do next.
        held = {name: value.to("cpu", non_blocking=True) if value.is_cuda else value for name, value in metrics.items()}
        batch = batch_at(i + 1) if i + 1 in steps else None
        end = Moment(metrics["loss"].device)  # a step that has to wait for its successor's batch has taken so long
        behind.leave(i + 1, partial(tell, i + 1, state, begun, held, end))
    behind.settle()
    return state


class Moment:
    """The moment at which a CUDA device has done what it was told so far; on others the host's now."""

    def __init__(self, device: torch.device | None) -> None:
        """Mark it."""
        self.device, self._event = device, torch.cuda.Event(enable_timing=True) if device is not None and device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._clock = time.perf_counter()

    def wait(self) -> None:
        """Wait until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def until(self, end: "Moment") -> float:
        """Give the seconds to another that has just come, or on a CUDA device had come before."""
        if self._event is not None and end._event is not None:
            return self._event.elapsed_time(end._event) / 1e3
        return time.perf_counter() - self._clock


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
