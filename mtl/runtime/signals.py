"""Signals that ask a run to end: noticed at any moment, also while the main thread is inside a kernel, a compiler or a slow import.

Imports nothing but the standard library, so that it can be installed before the slow imports begin.
"""

import os
import select
import signal
import time
from types import FrameType

ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends ahead of a job's end, where it is told to."""
AGAIN_SECONDS = 3.0
"""A second Ctrl-C counts after this time alone: torchrun passes on what the terminal sent to everybody already."""


class Signals:
    """Signals caught so far. The number of each goes through a pipe, written by the operating system's handler itself."""

    def __init__(self) -> None:
        """Catch them from now on. Only the main thread can."""
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        self.caught: int | None = None
        self._interrupted: float | None = None
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in ASKS:
            signal.signal(number, self._notice)

    def wait(self, seconds: float) -> int | None:
        """Wait for a signal for at most this time; gives the first that ever came. Any thread may call this."""
        if self.caught is None and select.select([self._reader], [], [], seconds)[0]:
            numbers = [n for n in os.read(self._reader, 64) if n in ASKS]
            self.caught = self.caught if self.caught is not None or not numbers else numbers[0]
        elif self.caught is not None:
            time.sleep(seconds)
        return self.caught

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.caught = self.caught if self.caught is not None else number
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > AGAIN_SECONDS:
                os._exit(130)
            self._interrupted = self._interrupted or now


def install() -> Signals:
    """Catch the signals that ask a run to end."""
    return Signals()
