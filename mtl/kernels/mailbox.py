"""Messages between the GPUs of one host by their copy engines: no kernel waits, so none takes multiprocessors from the products beside it.

Every device has a few slots for each device that sends to it, in memory that all members reach. A message is copied to an outbox by the
stream that made it, pushed into the receiver's slot by a stream of its own, and copied out by the stream that needs it. Counters that the
streams write and wait for tell what has arrived and what is free again. The process waits for nothing.
"""

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl.kernels import counters

PAGE = 4096
OUTBOX = 2
"""Messages to one receiver that may have left the stream that made them, but not yet the device."""

_symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")
_c10d: Any = importlib.import_module("torch._C._distributed_c10d")


@dataclass(eq=False)
class Mailbox:
    """The slots of one group. ``sources[d]`` are the members that send to member d; all members open it alike, and at the same time."""

    group: str
    sources: Sequence[Sequence[int]]
    slots: int = 0
    bytes: int = 0
    sent: Counter[int] = field(default_factory=Counter[int])
    taken: Counter[int] = field(default_factory=Counter[int])

    def open(self, slots: int, size: int) -> None:
        """Make room for ``slots`` messages of ``size`` bytes from every source, unless there is enough."""
        if slots <= self.slots and size <= self.bytes:
            return
        self.slots, self.bytes = max(slots, self.slots), max(-(-size // PAGE) * PAGE, self.bytes)
        self.sent.clear()
        self.taken.clear()
        device = torch.device("cuda", torch.cuda.current_device())
        members: Any = _c10d._resolve_process_group(self.group)
        torch.cuda.synchronize()
        dist.barrier(members)  # no member still uses the old memory
        self._end = max(len(row) for row in self.sources) * self.slots * self.bytes
        self._memory = _symmetric.empty(self._end + 2 * PAGE, dtype=torch.uint8, device=device)
        self._memory[self._end :].zero_()
        self._handle = _symmetric.rendezvous(self._memory, self.group)
        self._me = self._handle.rank
        receivers = [d for d, row in enumerate(self.sources) if self._me in row]
        self._streams = {d: torch.cuda.Stream(priority=-1) for d in receivers}
        self._out = {d: torch.empty(OUTBOX, self.bytes, dtype=torch.uint8, device=device) for d in receivers}
        self._left = {d: [torch.cuda.Event() for _ in range(OUTBOX)] for d in receivers}
        torch.cuda.synchronize()
        dist.barrier(members)
        torch.cuda.synchronize()

    def send(self, x: Tensor, to: int) -> None:
        """Send ``x`` to a member; its memory may be used again by this stream at once."""
        number, main, stream = self.sent[to], torch.cuda.current_stream(), self._streams[to]
        self.sent[to] += 1
        left = self._left[to][number % OUTBOX]
        mine = self._out[to][number % OUTBOX][: x.nbytes].view(x.dtype).view(x.shape)
        if number >= OUTBOX:
            main.wait_event(left)
        mine.copy_(x)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            if number >= self.slots:
                counters.wait(stream, self._counter(self._me, 1, to), number - self.slots + 1)
            self._slot(to, self._me, number, tuple(x.shape), x.dtype).copy_(mine)
            counters.write(stream, self._counter(to, 0, self._me), number + 1)
            left.record(stream)

    def take(self, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Give the next message from a member, once it is here."""
        number, main = self.taken[source], torch.cuda.current_stream()
        self.taken[source] += 1
        counters.wait(main, self._counter(self._me, 0, source), number + 1)
        x = self._slot(self._me, source, number, shape, dtype).clone()
        counters.write(main, self._counter(source, 1, self._me), number + 1)
        return x

    def _slot(self, member: int, source: int, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        slot = self.sources[member].index(source) * self.slots + number % self.slots
        return self._handle.get_buffer(member, shape, dtype, slot * self.bytes // dtype.itemsize)

    def _counter(self, member: int, row: int, other: int) -> int:
        """Give the address of what ``member`` is told by ``other``: row 0 what has arrived, row 1 what is free again."""
        return self._handle.buffer_ptrs[member] + self._end + PAGE * row + 4 * other


def room(sources: Sequence[Sequence[int]], member: int, slots: int, size: int) -> int:
    """Count the bytes of a member's mailbox: slots for what comes, two outboxes for each receiver."""
    size = -(-size // PAGE) * PAGE
    receivers = sum(member in row for row in sources)
    return max(len(row) for row in sources) * slots * size + 2 * PAGE + receivers * OUTBOX * size


_BOXES: dict[tuple[str, tuple[tuple[int, ...], ...]], Mailbox] = {}


def mailbox(group: str, sources: tuple[tuple[int, ...], ...]) -> Mailbox:
    """Give a group's mailbox: training and evaluation share it."""
    return _BOXES.setdefault((group, sources), Mailbox(group, sources))
