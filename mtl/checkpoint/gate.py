"""The gate before every update: where a run can be stopped between two steps, on all processes after the same one."""

import threading
import time
from typing import Any


class Gate:
    """Counts the updates that were let through and the steps that are done; closed, it holds the update after a given step.

    The thread that stops a run reads how far each process has come (`freeze`), lets all come as far as the furthest (`allow`) and waits
    until that step is done (`wait_done`): then the state stands still, whatever the main thread does: compile, evaluate, or load data.
    """

    def __init__(self, first: int) -> None:
        """Begin after ``first`` steps."""
        self.passed = self.done = first
        self.record: dict[str, Any] | None = None
        self.state: Any = None
        self._limit: int | None = None
        self._change = threading.Condition()

    def before_update(self) -> None:
        """Let the next update through, or hold it."""
        with self._change:
            while self._limit is not None and self.passed >= self._limit:
                self._change.wait()
            self.passed += 1

    def after_step(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Say that a step is done: the first of the loop's hooks."""
        with self._change:
            self.done, self.state, self.record = step, state, dict(record)
            self._change.notify_all()

    def freeze(self) -> int:
        """Let no update through any more; gives the last step whose update was."""
        with self._change:
            self._limit = self.passed
            return self.passed

    def allow(self, step: int) -> None:
        """Let updates through up to this step."""
        with self._change:
            self._limit = step
            self._change.notify_all()

    def wait_done(self, step: int, seconds: float) -> bool:
        """Wait until a step is done."""
        end = time.monotonic() + seconds
        with self._change:
            while self.done < step:
                if time.monotonic() > end:
                    return False
                self._change.wait(max(0.01, end - time.monotonic()))
        return True
