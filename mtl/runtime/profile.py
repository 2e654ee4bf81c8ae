"""Where a step's time goes: record steps, write a Chrome trace, and say on one page what the device did."""

import contextlib
import heapq
import json
import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = r"gemm|nvjet|cutlass|cublas|splitk|triton_tem|_mm\b|::(mm|bmm|addmm|baddbmm|matmul|linear|mkl_linear)\b"
KINDS = (
    ("other compute", re.compile(r"triton_(poi|red|per|for|split)\w*_fused|cpp_fused")),
    ("communication", re.compile(r"nccl|_?c10d|gloo:|rccl|PtoP|multimem|symm_mem", re.IGNORECASE)),
    ("host copies", re.compile(r"HtoD|DtoH")),
    ("attention", re.compile(r"sdpa|fmha|flash|attention|flex_", re.IGNORECASE)),
    ("matmul", re.compile(PRODUCTS, re.IGNORECASE)),
)
"""What a name is, the first that matches. The compiler's fused kernels come first: they carry the names of all they were made from."""
COMPUTE: tuple[str, ...] = ("matmul", "attention", "other compute")
ROWS: tuple[str, ...] = (*COMPUTE, "communication", "host copies")
Hook = Callable[[int, Any, dict[str, Any]], None]


class Event(NamedTuple):
    """What ran, when and how long in microseconds, and on which stream; ``calls`` is 0 where it goes on after a break."""

    name: str
    start: float
    duration: float
    stream: int | str = 0
    calls: int = 1


class Top(NamedTuple):
    """All events of one name: their kind, how many, and their time in microseconds."""

    name: str
    kind: str
    count: int
    time: float


@dataclass(frozen=True)
class Summary:
    """How the time from ``start`` to ``end`` was spent, in microseconds. ``shown`` sums up to the whole with ``idle``.

    Every instant counts once: as a product if one runs, else attention, else other compute, else (exposed) communication, else a copy
    between host and device. ``hidden`` is the communication during which something computes.
    """

    steps: int
    length: float
    shown: dict[str, float]
    idle: float
    hidden: float
    top: tuple[Top, ...]

    def share(self, row: str) -> float:
        """Give a row's share of the whole."""
        return (self.idle if row == "idle" else self.shown[row]) / self.length if self.length else 0.0


def kind_of(name: str) -> str:
    """Say what a kernel or operation is by its name."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other compute")


def summarize(events: Iterable[Event], steps: int = 1, window: tuple[float, float] | None = None, rows: int = 15) -> Summary:
    """Sum up what ran in ``window`` (by default from the first start to the last end), over ``steps`` steps."""
    events = [e for e in events if e.duration > 0]
    start, end = window or (min((e.start for e in events), default=0.0), max((e.start + e.duration for e in events), default=0.0))
    cut: list[tuple[str, str, float, float, int]] = []
    for e in events:
        left, right = max(e.start, start), min(e.start + e.duration, end)
        if left < right:
            cut.append((e.name, kind_of(e.name), left, right, e.calls))
    shown, hidden = dict.fromkeys(ROWS, 0.0), 0.0
    marks = sorted([(left, 1, kind) for _, kind, left, _, _ in cut] + [(right, -1, kind) for _, kind, _, right, _ in cut])
    running = dict.fromkeys(ROWS, 0)
    before = start
    for at, change, kind in marks:
        top = next((row for row in ROWS if running[row]), None)
        if top is not None:
            shown[top] += at - before
            hidden += at - before if top in COMPUTE and running["communication"] else 0.0
        running[kind] += change
        before = at
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, kind, left, right, calls in cut:
        sums[name, kind][0] += calls
        sums[name, kind][1] += right - left
    largest = heapq.nlargest(rows, ((time, name, kind, int(count)) for (name, kind), (count, time) in sums.items()))
    ranked = tuple(Top(name, kind, count, time) for time, name, kind, count in largest)
    return Summary(steps, end - start, shown, end - start - sum(shown.values()), hidden, ranked)


def page(found: Summary, about: str, width: int = 76) -> str:
    """Write the one page."""
    each = max(found.steps, 1) * 1e3
    lines = [about, f"{found.steps} steps, {found.length / each:.2f} ms each", ""]
    names = {"communication": "exposed communication", "host copies": "exposed host copies"}
    for row in (*ROWS, "idle"):
        time = found.idle if row == "idle" else found.shown[row]
        lines.append(f"{names.get(row, row):22s} {time / each:10.2f} ms  {found.share(row):6.1%}  {'#' * round(40 * found.share(row))}")
    lines += [f"{'(hidden communication':22s} {found.hidden / each:10.2f} ms, while something computes)", ""]
    lines.append(f"{'ms a step':>10s} {'share':>6s} {'times':>7s}  {'kind':14s} name")
    for top in found.top:
        name = top.name if len(top.name) <= width else f"{top.name[: width - 3]}..."
        share = top.time / found.length if found.length else 0.0
        lines.append(f"{top.time / each:10.2f} {share:6.1%} {top.count / max(found.steps, 1):7.1f}  {top.kind:14s} {name}")
    return "\n".join(lines) + "\n"


def read_trace(trace: Any) -> list[Event]:
    """Take what ran from a Chrome trace of torch's profiler: kernels and copies where a device has any, else the CPU's operations.

    The CPU's operations contain each other; each counts without those inside it.
    """
    complete = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    device = [e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if device:
        return [Event(e["name"], e["ts"], e["dur"], e.get("args", {}).get("stream", e["tid"])) for e in device]
    lanes: dict[Any, list[Any]] = defaultdict(list)
    for e in complete:
        if e.get("cat") == "cpu_op" or (e.get("cat") == "user_annotation" and e["name"].startswith(("gloo:", "nccl:"))):
            lanes[e["tid"]].append(Event(e["name"], e["ts"], e["dur"], e["tid"]))
    return [piece for lane in lanes.values() for piece in outermost_last(lane)]


def outermost_last(lane: Sequence[Event]) -> list[Event]:
    """Cut nested events of one thread into pieces, each named after the innermost event that runs."""
    pieces: list[Event] = []
    begun: set[Event] = set()
    open_events: list[tuple[float, Event]] = []
    at = 0.0

    def upto(time: float) -> None:
        nonlocal at
        if open_events and time > at:
            inner = open_events[-1][1]
            pieces.append(Event(inner.name, at, time - at, inner.stream, int(inner not in begun)))
            begun.add(inner)
        at = max(at, time)

    for event in sorted(lane, key=lambda e: (e.start, -e.duration)):
        while open_events and open_events[-1][0] <= event.start:
            upto(open_events[-1][0])
            open_events.pop()
        upto(event.start)
        end = event.start + event.duration
        open_events.append((min(end, open_events[-1][0]) if open_events else end, event))
    while open_events:
        upto(open_events[-1][0])
        open_events.pop()
    return pieces


MARK = "mtl: profiled steps"


class Profiler:
    """Records some steps and writes ``trace.json`` and ``summary.txt`` into a folder."""

    def __init__(self, folder: Path, device: torch.device, about: str) -> None:
        """Say where to write and what the page is about."""
        self.folder, self.device, self.about = folder, device, about
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """Begin to record."""
        self._profile: Any = self._stack.enter_context(recording(self.device))
        self._stack.enter_context(torch.profiler.record_function(MARK))

    def stop(self, steps: int) -> Summary:
        """End after so many steps; write both files and give the summary."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self._stack.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "trace.json"
        self._profile.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(errors="replace"))
        marks = [e for e in trace["traceEvents"] if e.get("name") == MARK and e.get("cat") == "user_annotation" and e.get("ph") == "X"]
        window = (marks[0]["ts"], marks[0]["ts"] + marks[0]["dur"]) if marks else None
        found = summarize(read_trace(trace), steps, window)
        (self.folder / "summary.txt").write_text(page(found, self.about))
        return found


@contextlib.contextmanager
def recording(device: torch.device) -> Generator[Any]:
    """Record with torch's profiler what the CPU and the device do."""
    kinds = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
    activities = [ProfilerActivity.CPU, *([kinds[device.type]] if device.type in kinds else [])]
    with profile(activities=activities) as found:
        yield found


def profiled_steps(first: int, last: int, steps: int) -> tuple[int, int]:
    """Choose between which steps a run from ``first`` to ``last`` is profiled: past the first three, where it can."""
    steps = min(steps, last - first)
    begin = max(first, min(first + 3, last - steps))
    return begin, begin + steps


def profiling(profiler: Profiler, first: int, last: int, steps: int, say: Callable[[str], None]) -> Hook:
    """Make the hook that records ``steps`` of the steps after ``first`` up to ``last``, past the first three (they compile) where it can.

    It must be made just before step ``first + 1``.
    """
    begin, end = profiled_steps(first, last, steps)
    steps = end - begin
    if begin == first and steps:
        profiler.start()

    def hook(i: int, state: Any, record: dict[str, Any]) -> None:
        if i == begin and steps:
            profiler.start()
        elif i == end and steps:
            profiler.stop(steps)
            text = (profiler.folder / "summary.txt").read_text()
            say(f"profile of steps {begin + 1} to {i}, in {profiler.folder} (trace.json, summary.txt):\n{text}")

    return hook
