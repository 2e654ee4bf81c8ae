"""Tensors that wait in host memory: they leave a GPU while it computes on, and come back ahead of use. On a CPU the same are copies.

What was parked last is needed first (layers run backwards), so bringing one back starts to bring the one parked before it. Both ways have
a stream of their own. A tensor leaves by way of two small buffers on the device, so that its memory is free at once.
"""

import functools
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STAGE = 2**27
"""Bytes of each of the two buffers on the way out."""
AHEAD = 2**31
"""Larger tensors are not brought back ahead of use: their copy takes little beside what is computed from them, and they take much room."""

TOUCHING = 4
"""Threads that touch memory which is to be pinned."""

_ANY = (torch.Tag.flexible_layout,)
_library: Any = torch.library.Library("mtl_host", "DEF")
_library.define("park(Tensor x) -> Tensor", tags=_ANY)
_library.define("unpark(Tensor host, Tensor after) -> Tensor", tags=_ANY)


def park(x: Tensor) -> Tensor:
    """Copy a tensor to host memory, and give that copy, which may still be under way: it is good for `unpark` alone."""
    op: Any = torch.ops.mtl_host.park
    return op(x)


def unpark(host: Tensor, after: Tensor) -> Tensor:
    """Give what was parked on the device of ``after``, which must be made first: a compiler may not bring back everything at once."""
    op: Any = torch.ops.mtl_host.unpark
    return op(host, after)


@dataclass
class Lanes:
    """One device's streams from and to the host, and the buffers on the way out, each with the event that says it is free."""

    out: torch.cuda.Stream
    back: torch.cuda.Stream
    stages: list[Tensor]
    free: list[torch.cuda.Event]
    turn: int = 0
    parked: list["_Parked"] = field(default_factory=list["_Parked"])


@dataclass
class _Parked:
    host: "weakref.ref[Tensor]"
    address: int
    stored: torch.cuda.Event
    ahead: tuple[Tensor, torch.cuda.Event] | None = None


def lanes(device: torch.device) -> Lanes:
    """Give a device's lanes: one set, whether or not the device is named with its number."""
    return _lanes(torch.cuda.current_device() if device.index is None else device.index)  # pyright: ignore[reportUnnecessaryComparison]


@functools.cache
def _lanes(index: int) -> Lanes:
    device = torch.device("cuda", index)
    stages = [torch.empty(STAGE, dtype=torch.uint8, device=device) for _ in range(2)]
    return Lanes(torch.cuda.Stream(device), torch.cuda.Stream(device), stages, [torch.cuda.Event() for _ in range(2)])


def pin(x: Tensor, device: torch.device) -> Tensor:
    """Make host memory such that the device's copies from and to it run beside everything else; gives the same tensor.

    Touched by some threads first: 0.08 s a GiB on an H200's host, and 0.39 s where the driver touches page after page.
    """
    if device.type != "cuda" or x.numel() == 0:
        return x
    with ThreadPoolExecutor(TOUCHING) as pool:  # of its own: torchrun gives torch one thread
        list(pool.map(lambda part: part[:: max(1, 4096 // x.dtype.itemsize)].add_(0), x.view(-1).chunk(TOUCHING)))
    cudart: Any = torch.cuda.cudart()
    # Memory of torch's own pinned pool is rounded up to a power of two: 7 GiB would be 8.
    torch.cuda.check_error(int(cudart.cudaHostRegister(x.data_ptr(), x.nbytes, 0)))
    weakref.finalize(x, cudart.cudaHostUnregister, x.data_ptr()).atexit = False
    return x


def bring(host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy a contiguous part of pinned memory to the device. Gives the copy and what to wait for."""
    return fetch(lanes(device), host, None, device) if device.type == "cuda" else (host.clone(), None)


def put(x: Tensor, host: Tensor) -> torch.cuda.Event | None:
    """Start to copy a tensor that nobody writes to any more into pinned memory. Gives what to wait for."""
    if x.device.type != "cuda":
        host.copy_(x)
        return None
    lane, event = lanes(x.device), torch.cuda.Event()
    lane.out.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(lane.out):
        host.copy_(x, non_blocking=True)
        x.record_stream(lane.out)
        event.record(lane.out)
    return event


def send(lane: Lanes, x: Tensor, host: Tensor) -> torch.cuda.Event:
    """Copy a contiguous tensor to pinned memory; x may be written to by what follows. Gives the event after which it is there."""
    main, source, target = torch.cuda.current_stream(x.device), x.view(-1), host.view(-1)
    step = STAGE // x.dtype.itemsize
    for at in range(0, source.numel(), step):
        piece, slot = source[at : at + step], lane.turn % 2
        lane.turn += 1
        stage = lane.stages[slot].view(x.dtype)[: piece.numel()]
        main.wait_event(lane.free[slot])
        stage.copy_(piece)
        lane.out.wait_stream(main)
        with torch.cuda.stream(lane.out):
            target[at : at + step].copy_(stage, non_blocking=True)
            lane.free[slot].record(lane.out)
    event = torch.cuda.Event()
    event.record(lane.out)
    return event


def fetch(lane: Lanes, host: Tensor, after: torch.cuda.Event | None, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """Start to copy pinned memory to the device, once ``after`` has happened. Gives the copy and the event after which it is whole."""
    out = torch.empty(host.shape, dtype=host.dtype, device=device)
    lane.back.wait_stream(torch.cuda.current_stream(device))  # the memory of ``out`` may have had another use until now
    if after is not None:
        lane.back.wait_event(after)
    with torch.cuda.stream(lane.back):
        out.copy_(host, non_blocking=True)
        out.record_stream(lane.back)
        event = torch.cuda.Event()
        event.record(lane.back)
    return out, event


def _park(x: Tensor) -> Tensor:
    lane, x = lanes(x.device), x.contiguous()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    lane.parked[:] = [entry for entry in lane.parked if entry.host() is not None]
    lane.parked.append(_Parked(weakref.ref(host), host.data_ptr(), send(lane, x, host)))
    return host


def _unpark(host: Tensor, after: Tensor) -> Tensor:
    device = after.device
    lane = lanes(device)
    place = max(i for i, entry in enumerate(lane.parked) if entry.address == host.data_ptr())
    entry = lane.parked.pop(place)
    out, whole = entry.ahead or fetch(lane, host, entry.stored, device)
    before = lane.parked[place - 1] if place else None
    other = None if before is None else before.host()
    if before is not None and other is not None and before.ahead is None and other.nbytes <= AHEAD:
        before.ahead = fetch(lane, other, before.stored, device)
    torch.cuda.current_stream(device).wait_event(whole)
    return out


_library.impl("park", _park, "CUDA")
_library.impl("park", lambda x: x.clone(memory_format=torch.contiguous_format), "CPU")
_library.impl("unpark", _unpark, "CUDA")
_library.impl("unpark", lambda host, after: host.clone(), "CPU")
torch.library.register_fake(
    "mtl_host::park", lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta" if x.device.type == "meta" else "cpu"), lib=_library
)
torch.library.register_fake(
    "mtl_host::unpark", lambda host, after: torch.empty(host.shape, dtype=host.dtype, device=after.device), lib=_library
)
