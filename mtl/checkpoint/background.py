"""Saving beside training: values are copied to host memory while the next gradient is computed, then written by a thread.

The state is written in place by the step's update, so an update waits at `Saver.fence` until the copy is done: on a GPU the device waits,
not the process, so that a copy which ends within the gradient costs nothing. What does not fit into the host memory that is allowed goes
in waves: copied, written, and the memory used again, while the update waits.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl import tree
from mtl.checkpoint import arrays
from mtl.checkpoint.geometry import Box
from mtl.checkpoint.peers import CheckpointError, peers
from mtl.checkpoint.plan import Plan, PlannedLeaf, make_plan, regular
from mtl.checkpoint.save import Part, Piece, part_of, small_files, write_checkpoint
from mtl.errors import UserError
from mtl.kernels import host_copy

SLAB = 512 << 20
"""Host memory is taken in pieces of this size."""
REGISTERED = 64 << 20
"""Memory of at least this size has pages of its own, which can be registered."""
ALIGN = 64


class Saver:
    """Saves states one after the other in a thread. The process that made it calls everything; no two saves overlap."""

    def __init__(self, host_memory: int | None = None, threads: int = 4, on_failure: Callable[[str], None] | None = None) -> None:
        """Bound the host memory for copies, in bytes (None: as much as this process's share). ``on_failure`` is told of errors at once."""
        self.host_memory, self.threads, self.on_failure = host_memory, threads, on_failure
        self.committed: Path | None = None
        self._thread: threading.Thread | None = None
        self._asked = threading.Event()  # every copy of the save under way is asked for; on the CPU: made
        self._asked.set()
        self._last_copy: Any = None  # on a GPU: the event after them
        self._failure: Exception | None = None
        self._slabs: list[Tensor] = []
        self._lock = threading.RLock()

    def prepare(self, state: tree.Tree) -> threading.Thread:
        """Take the memory for copies of such a state now, in a thread, so that the first save is as quick as the others."""

        def work() -> None:
            with self._lock:
                plan, device = make_plan(state, peers()), device_of(state)
                _enter(device)
                size, slabs = self._sizes([(leaf, box) for leaf in plan.leaves for box in leaf.mine])
                for i in range(slabs):
                    self._slab(i, size, device)

        thread = threading.Thread(target=work, name="prepare", daemon=True)
        thread.start()
        return thread

    def save(
        self,
        path: Path,
        state: tree.Tree,
        *,
        host: Any = None,
        config: Any = None,
        extra: Mapping[str, Any] | None = None,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Start a save as `mtl.checkpoint.save` makes it, once the one before has ended.

        Until `fence` returns the state must not be written to. An error of the save before is raised here. ``before`` and ``after`` run in
        the thread, before anything is written and after the commit; ``before`` must not raise, since the other processes would wait.
        """
        with self._lock:
            self.wait()
            group = peers()
            path, small = path.absolute(), small_files(host, config, extra)
            plan, part = make_plan(state, group), part_of(regular(state))
            device = device_of(state)
            ready = _mark(device)
            self._last_copy = None
            self._asked.clear()

            def work() -> None:
                try:
                    _enter(device)
                    waves = self._copy_waves(plan, part, device, ready)
                    first = next(waves, [])
                    before()
                    write_checkpoint(path, plan, small, group, _chain(first, waves), self.threads)
                    self.committed = path
                    after()
                except Exception as problem:
                    self._failure = problem
                    if self.on_failure is not None:
                        self.on_failure(describe(problem))
                finally:
                    self._asked.set()

            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()

    def fence(self) -> None:
        """Let what this thread does next write to the state; on a GPU that means what its current stream is given next."""
        self._asked.wait()
        last = self._last_copy
        if last is not None:
            torch.cuda.current_stream().wait_event(last)

    def busy(self) -> bool:
        """Tell whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save under way; raise its error, once."""
        with self._lock:
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            self.check()

    def check(self) -> None:
        """Raise the error of a save that failed, once; without waiting."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure if isinstance(failure, UserError) else CheckpointError(describe(failure)) from failure

    def _copy_waves(self, plan: Plan, part: Part, device: torch.device, ready: Any) -> Iterator[list[Piece]]:
        """Copy this process's pieces to host memory, as many at once as it allows."""
        todo = [(leaf, box) for leaf in plan.leaves for box in leaf.mine]
        size, slabs = self._sizes(todo)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if stream is not None:
            stream.wait_event(ready)
        while todo:
            wave: list[Piece] = []
            slab, used = 0, 0
            while todo:
                leaf, box = todo[0]
                if used + _room(leaf, box) > size:
                    slab, used = slab + 1, 0
                if slab >= slabs:
                    break
                todo.pop(0)
                target = _carve(self._slab(slab, size, device), used, leaf, box)
                with torch.no_grad(), torch.cuda.stream(stream):
                    target.copy_(part(leaf.name, box), non_blocking=stream is not None)
                used += _room(leaf, box)
                wave.append((leaf, box, target))
            if not todo:
                self._last_copy = None if stream is None else stream.record_event()
                self._asked.set()
            if stream is not None:
                stream.synchronize()
            self._last_copy = None
            yield wave

    def _sizes(self, todo: Sequence[tuple[PlannedLeaf, Box]]) -> tuple[int, int]:
        """Give the size of a slab and how many to use: all that is needed, or what the bound allows, and at least one."""
        rooms = [_room(leaf, box) for leaf, box in todo]
        total, largest = sum(rooms), max(rooms, default=0)
        limit = total if self.host_memory is None else min(total, self.host_memory)
        size = max(_power(largest), min(SLAB, _power(limit)))
        needed, used = 1, 0
        for room in rooms:
            needed, used = (needed + 1, room) if used + room > size else (needed, used + room)
        return size, needed if self.host_memory is None else max(1, min(needed, limit // size))

    def _slab(self, i: int, size: int, device: torch.device) -> Tensor:
        if self._slabs and self._slabs[0].numel() < size:
            self._slabs = []
        while len(self._slabs) <= i:
            if device.type == "cuda" and size < REGISTERED:
                self._slabs.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
            else:
                self._slabs.append(host_copy.pin(arrays.empty((size,), torch.uint8), device))
        return self._slabs[i]


def device_of(state: tree.Tree) -> torch.device:
    """Give the device that a state lies on."""
    devices = {x.device for x in tree.leaves(state) if isinstance(x, Tensor)}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def describe(problem: Exception) -> str:
    """Say an error in one line."""
    return str(problem) if isinstance(problem, UserError) else f"saving failed: {type(problem).__name__}: {problem}"


def _enter(device: torch.device) -> None:
    """Make the state's device this thread's: a new thread begins on the first, where it would set up a context of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _mark(device: torch.device) -> Any:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _chain(first: list[Piece], rest: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
    yield first
    yield from rest


def _bytes(leaf: PlannedLeaf, box: Box) -> int:
    return torch.Size(box[1]).numel() * getattr(torch, leaf.dtype).itemsize


def _room(leaf: PlannedLeaf, box: Box) -> int:
    return -(-_bytes(leaf, box) // ALIGN) * ALIGN


def _power(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def _carve(slab: Tensor, start: int, leaf: PlannedLeaf, box: Box) -> Tensor:
    return slab[start : start + _bytes(leaf, box)].view(getattr(torch, leaf.dtype)).view(box[1])
