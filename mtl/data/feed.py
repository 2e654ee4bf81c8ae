"""Make batches while the device works: threads build them ahead, pinned, and the copy to the device waits for nothing."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mtl.errors import LocalError, UserError

Batch = dict[str, Tensor]


class Feed:
    """``feed(i)`` gives the batch of step i. Since a batch depends on its step alone, threads change nothing but the time."""

    def __init__(self, make: Callable[[int], Batch], steps: range, device: torch.device, workers: int = 2, ahead: int = 4) -> None:
        """Take what makes a batch in host memory. ``workers`` 0 makes each when it is asked for."""
        self._make, self._steps, self._device = make, steps, device
        self._ahead = ahead if workers else 0
        self._threads = ThreadPoolExecutor(workers, "data") if workers else None
        self._coming: dict[int, Future[Batch]] = {}
        self.waited = 0.0
        """Seconds that the last call waited for its batch."""

    def __call__(self, step: int) -> Batch:
        """Give one batch on the device."""
        start = time.perf_counter()
        self._ask(range(step, step + 1 + self._ahead))
        coming = self._coming.pop(step, None)
        try:
            batch = self._prepare(step) if coming is None else coming.result()
        except UserError as error:
            raise LocalError(str(error)) from None  # other ranks read other samples: this one must say it itself
        self.waited = time.perf_counter() - start
        return to(batch, self._device)

    def close(self) -> None:
        """Let the threads go."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _ask(self, steps: range) -> None:
        if self._threads is None:
            return
        for old in [s for s in self._coming if s not in steps]:
            self._coming.pop(old).cancel()
        for step in steps:
            if step in self._steps and step not in self._coming:
                self._coming[step] = self._threads.submit(self._prepare, step)

    def _prepare(self, step: int) -> Batch:
        batch = self._make(step)
        return {name: x.pin_memory() for name, x in batch.items()} if self._device.type == "cuda" else batch


def to(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; from pinned memory, without waiting."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}
