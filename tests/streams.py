"""GPUs on paper: streams that do what was put on them in order, at random times, with the counters and meetings of real ones."""

import contextlib
import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from typing import Any

import torch

from mtl.kernels.mailbox import OUTBOX, Mailbox
from mtl.pipeline.table import Action, Table


class Stream:
    """What is to be done, in order: (may it begin, do it)."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        self.put_on, self.done = 0, 0

    def put(self, do: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        self.waiting.append((ready, do))
        self.put_on += 1

    def wait_stream(self, other: "Stream") -> None:
        mark = other.put_on
        self.put(lambda: None, lambda: other.done >= mark)

    def wait_event(self, event: "Event") -> None:
        stream, mark = event.at
        self.put(lambda: None, lambda: stream.done >= mark)


class Event:
    """A place on a stream."""

    def record(self, stream: Stream) -> None:
        self.at = (stream, stream.put_on)


class Gpus:
    """Devices with a main stream each, of which one issues now."""

    def __init__(self, devices: int) -> None:
        self.main = [Stream() for _ in range(devices)]
        self.streams = list(self.main)
        self.current = self.main[0]
        self.words: dict[int, int] = defaultdict(int)
        self.memory: dict[tuple[int, int], Value] = {}
        self.met: dict[tuple[Any, int], list[Value]] = {}
        self.posted: dict[tuple[Any, bool], int] = defaultdict(int)

    def stream(self, **_: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Generator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def write(self, stream: Stream, address: int, value: int) -> None:
        stream.put(lambda: self.words.__setitem__(address, value))

    def wait(self, stream: Stream, address: int, value: int) -> None:
        stream.put(lambda: None, lambda: self.words[address] >= value)

    def play(self, rng: random.Random) -> bool:
        """Do everything, in random order where the streams allow it; False if it comes to a stand."""
        while any(s.waiting for s in self.streams):
            ready = [s for s in self.streams if s.waiting and s.waiting[0][0]()]
            if not ready:
                return False
            stream = rng.choice(ready)
            stream.waiting.popleft()[1]()
            stream.done += 1
        return True


class Value:
    """A tensor on paper: what it holds when a stream gets there."""

    shape, dtype, nbytes = (1,), torch.uint8, 1

    def __init__(self, gpus: Gpus) -> None:
        self.gpus, self.holds = gpus, None

    def copy_(self, other: "Value") -> None:
        self.gpus.current.put(lambda: setattr(self, "holds", other.holds))

    def clone(self) -> "Value":
        new = Value(self.gpus)
        new.copy_(self)
        return new

    def contiguous(self) -> "Value":
        return self

    def view(self, *_: Any) -> "Value":
        return self

    def __getitem__(self, _: Any) -> "Value":
        return self


class Word:
    """A message that a communicator sends or receives: `wait` is the current stream's."""

    def __init__(self, gpus: Gpus, stream: Stream) -> None:
        self.gpus, self.stream, self.mark = gpus, stream, stream.put_on

    def wait(self) -> None:
        self.gpus.current.put(lambda: None, lambda: self.stream.done >= self.mark)

    def is_completed(self) -> bool:
        return False


class Communicators:
    """Stands for `Links`: each channel is a communicator, whose operations run in order at both ends and end when both have begun."""

    def __init__(self, gpus: Gpus, device: int, streams: dict[Any, Stream]) -> None:
        self.gpus, self.device, self._streams, self._free = gpus, device, streams, list[Value]()

    def take_buffer(self, *_: Any) -> Value:
        return self._free.pop() if self._free else Value(self.gpus)

    def return_buffer(self, buffer: Value) -> None:
        self._free.append(buffer)

    def post(self, channel: tuple[int, int], x: Value, tag: int) -> Word:
        gpus, out, main = self.gpus, channel[0] == self.device, self.gpus.current
        number, mark = gpus.posted[channel, out], main.put_on
        gpus.posted[channel, out] += 1
        stream = self._streams.setdefault((channel, out), gpus.stream())
        key = (channel, number)
        stream.put(lambda: gpus.met.setdefault(key, []).append(x), lambda: main.done >= mark)
        if out:
            stream.put(lambda: None, lambda: len(gpus.met.get(key, ())) == 2)
        else:
            stream.put(
                lambda: setattr(x, "holds", next(v for v in gpus.met[key] if v is not x).holds), lambda: len(gpus.met.get(key, ())) == 2
            )
        return Word(gpus, stream)


class PaperBox(Mailbox):
    """A mailbox on paper."""

    gpus: Gpus
    rank: int

    def open(self, slots: int, size: int) -> None:
        self.slots, self.bytes, self._end, self._me, self._handle = slots, 1, 1 << 20, self.rank, self
        receivers = [d for d, row in enumerate(self.sources) if self.rank in row]
        self._streams = {d: self.gpus.stream() for d in receivers}
        self._out = {d: [Value(self.gpus) for _ in range(OUTBOX)] for d in receivers}
        self._left = {d: [Event() for _ in range(OUTBOX)] for d in receivers}
        self.buffer_ptrs = [d << 32 for d in range(len(self.sources))]

    def get_buffer(self, member: int, shape: Any, dtype: Any, offset: int) -> Value:
        return self.gpus.memory.setdefault((member, offset), Value(self.gpus))


class Paper:
    """A device's work on paper: every action checks what it is given, and that what it stored is still what it was."""

    def __init__(self, gpus: Gpus, table: Table) -> None:
        self.gpus, self.table, self.done = gpus, table, list[str]()

    def forward(self, stage: int, micro: int, x: Value | None) -> Any:
        return self._do(Action(stage, "F", micro), x, []), (stage, micro, [(x, stage - 1, "F")])

    def backward(self, saved: Any, grad: Value | None) -> Any:
        return self._do(Action(saved[0], "B", saved[1]), grad, saved[2])

    def inputs(self, saved: Any, grad: Value | None) -> Any:
        return self.backward(saved, grad), (*saved[:2], [*saved[2], (grad, saved[0] + 1, "B")])

    def weights(self, saved: Any) -> None:
        self._do(Action(saved[0], "W", saved[1]), None, saved[2])

    def _do(self, action: Action, given: Value | None, stored: Any) -> Value:
        out, needs = Value(self.gpus), self.table.needs(action)

        def do() -> None:
            if given is not None:
                assert given.holds == str(needs), f"{action} was given {given.holds}"
            for value, stage, kind in stored:
                assert value is None or value.holds == f"{stage}{kind}{action.micro}", f"{action} finds {value.holds}"
            out.holds = str(action)
            self.done.append(str(action))

        self.gpus.current.put(do)
        return out


def random_table(rng: random.Random) -> Table:
    """Make any valid table: a random order in which everything can be done, on random devices."""
    devices, micros = rng.randint(1, 4), rng.randint(1, 7)
    stages = rng.randint(devices, 2 * devices)
    place = [*range(devices), *(rng.randrange(devices) for _ in range(stages - devices))]
    rng.shuffle(place)
    split = {(s, m) for s in range(stages) for m in range(micros) if rng.random() < 0.5}
    kinds = [Action(s, k, m) for s in range(stages) for m in range(micros) for k in ("FBW" if (s, m) in split else "FB")]
    rows: list[list[Action]] = [[] for _ in range(devices)]
    probe, done = Table("", tuple((a,) for a in kinds)), set[Action]()
    object.__setattr__(probe, "place", dict(enumerate(place)))
    eager = rng.random()
    while kinds:
        ready = [
            a for a in kinds if ((n := probe.needs(a)) is None or n in done) and (a.kind == "F" or Action(a.stage, "F", a.micro) in done)
        ]
        forwards = [a for a in ready if a.kind == "F"]
        action = rng.choice(forwards if forwards and rng.random() < eager else ready)
        kinds.remove(action)
        done.add(action)
        rows[place[action.stage]].append(action)
    return Table("random", tuple(tuple(row) for row in rows))
