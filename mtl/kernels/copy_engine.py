"""Gathers and sums between the GPUs of one host by their copy engines: no multiprocessor is taken from the products beside them.

NCCL's kernels hold multiprocessors while they wait for each other; beside them products ran at 660 of 770 TFLOP/s on H200s. Here a
weight is cast, or rounded to 8 bits, into memory that the peers can read, and each pulls the others' parts; a gradient's parts are pushed
into the peers' memory and summed there. A device's own part does not travel: a copy within a GPU is a kernel, which waits for a product
to end and then holds the next one up. Who may read or write when is told by counters that streams themselves write and wait for. Sums
are those of a reduce-scatter in a wider type: parts travel as they are and are added in ``dtype``. On a CPU the same operations are made
of gloo's.
"""

import importlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl.kernels import counters, fp8, nvidia
from mtl.kernels.columns import beside, cut

GATHERS, SUMS = 4, 3
"""How many gathers and sums may be under way at once."""
LARGE = 1 << 27
"""Gathers of more bytes a shard (vocabularies) go one at a time: several slots of their size would cost a gigabyte. Sums may not: a sum is
sent before two earlier ones are collected, and would wait for a slot that only their collecting frees.
"""
PAGE = 4096

_symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")
_c10d: Any = importlib.import_module("torch._C._distributed_c10d")
_library: Any = torch.library.Library("mtl_engine", "DEF")
_library.define("gather(Tensor[] shards, Tensor? scale, ScalarType dtype, bool turns, int size, str group) -> Tensor")
_library.define("send(Tensor parts, int size, str group) -> Tensor")
_library.define("collect(Tensor sent, Tensor parts, int[] columns, ScalarType dtype, bool turns, int size, str group) -> Tensor[]")


@dataclass
class Channel:
    """Memory of one kind of transfer that all members see: a few slots, and counters of what has been done with them.

    Row 0 of the counters says what can be read, row 1 what has been read. ``seen`` gathers have arrived on this device's own stream.
    """

    slots: int
    bytes: int
    memory: Tensor
    handle: Any
    stream: torch.cuda.Stream
    events: list[torch.cuda.Event]
    count: int = 0
    seen: int = 0

    def slot(self, member: int, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """View a member's slot of transfer ``number``."""
        return self.handle.get_buffer(member, shape, dtype, number % self.slots * self.bytes // dtype.itemsize)

    def tell(self, stream: torch.cuda.Stream, member: int, row: int, value: int) -> None:
        """Let the stream set, in a member's memory, this one's counter of a row."""
        address = self.handle.buffer_ptrs[member] + self.slots * self.bytes + PAGE * row + 4 * self.handle.rank
        counters.write(stream, address, value)

    def await_(self, stream: torch.cuda.Stream, member: int, row: int, value: int) -> None:
        """Let the stream wait until a member's counter of a row, in this one's memory, is at least ``value``."""
        address = self.handle.buffer_ptrs[self.handle.rank] + self.slots * self.bytes + PAGE * row + 4 * member
        counters.wait(stream, address, value)

    def is_free(self, number: int) -> bool:
        """Tell whether nobody can still read what lay in the slot of gather ``number`` before it, by what has been seen alone.

        A member offers a part once it has read all that was offered before. So who saw gather n arrive knows that all read n - 1.
        """
        return number < self.slots or self.seen >= number - self.slots + 2

    def others(self) -> list[int]:
        """List the other members, each one starting with the next, so that no two ask the same one at once."""
        size = self.handle.world_size
        return [(self.handle.rank + step) % size for step in range(1, size)]


_CHANNELS: dict[tuple[str, str, bool], Channel] = {}
_SENT: dict[int, tuple[Channel, int]] = {}
_LANDED: dict[int, Tensor] = {}
_TICKETS = itertools.count()


def gather(shards: list[Tensor], dtype: torch.dtype, size: int, group: str, scale: Tensor | None = None, turns: bool = False) -> Tensor:
    """Start to gather weights side by side, by rows, in ``dtype``: [rows, ...] each give [size x rows, columns]; `wait_tensor` ends it.

    With a scale they are rounded from ``dtype`` to 8 bits by it, and travel so. With ``turns`` the columns of two weights take turns.
    """
    assert not turns or (len(shards) == 2 and scale is None), "two weights in 16 bits or more take turns"
    return torch.ops.mtl_engine.gather(shards, scale, dtype, turns, size, group)  # pyright: ignore


def send(parts: Tensor, size: int, group: str) -> Tensor:
    """Start to send the next [rows / size, columns] of ``parts`` to each member; `collect` ends it and must be given the same parts."""
    return torch.ops.mtl_engine.send(parts, size, group)  # pyright: ignore


def collect(
    sent: Tensor, parts: Tensor, columns: list[int], dtype: torch.dtype, size: int, group: str, turns: bool = False
) -> list[Tensor]:
    """Sum what the members sent in ``dtype``, cut by columns, which with ``turns`` are two weights' in turn."""
    return torch.ops.mtl_engine.collect(sent, parts, columns, dtype, turns, size, group)  # pyright: ignore


def _gather(shards: list[Tensor], scale: Tensor | None, dtype: torch.dtype, turns: bool, size: int, group: str) -> Tensor:
    flat = [shard.flatten(1) for shard in shards]
    rows, columns = flat[0].shape[0], sum(x.shape[1] for x in flat)
    through, dtype = dtype, dtype if scale is None else fp8.VALUES
    channel, main = open_channel("gather", group, rows * columns * dtype.itemsize), torch.cuda.current_stream()
    me, number = channel.handle.rank, channel.count
    channel.count += 1
    out = flat[0].new_empty((size, rows, columns), dtype=dtype)
    if not channel.is_free(number):
        for member in channel.others():
            channel.await_(main, member, 1, number - channel.slots + 1)
    mine = channel.slot(me, number, (rows, columns), dtype)
    if scale is None:
        _cast(flat, mine, out[me], turns)
    else:
        places = zip(flat, *(whole.split([x.shape[1] for x in flat], 1) for whole in (mine, out[me])), strict=True)
        for x, there, here in places:
            fp8.lay(x, scale, through, there, here)
    channel.stream.wait_stream(main)
    with torch.cuda.stream(channel.stream):
        for member in channel.others():
            channel.tell(channel.stream, member, 0, number + 1)
        for member in channel.others():
            channel.await_(channel.stream, member, 0, number + 1)
            out[member].copy_(channel.slot(member, number, (rows, columns), dtype))
            channel.tell(channel.stream, member, 1, number + 1)
        whole = out.view(size * rows, columns)
        _c10d._register_work(whole, _Arrival(channel, number))
    return whole


class _Arrival(_symmetric.Work):
    """The end of a gather: the stream that waits for it has seen it, and therefore that its members read all before it."""

    def __init__(self, channel: Channel, number: int) -> None:
        super().__init__()
        self.channel, self.number = channel, number

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.channel.seen = max(self.channel.seen, self.number + 1)
        return super().wait(timeout)


def _send(parts: Tensor, size: int, group: str) -> Tensor:
    channel = open_channel("sum", group, parts.nbytes)
    me, number = channel.handle.rank, channel.count
    channel.count += 1
    pieces = parts.contiguous().view(size, -1)
    channel.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(channel.stream):
        for member in channel.others():
            if number >= channel.slots:
                channel.await_(channel.stream, member, 1, number - channel.slots + 1)
            channel.slot(member, number, tuple(pieces.shape), parts.dtype)[me].copy_(pieces[member])
            channel.tell(channel.stream, member, 0, number + 1)
        channel.events[number % channel.slots].record(channel.stream)
    pieces.record_stream(channel.stream)
    ticket = next(_TICKETS)
    _SENT[ticket] = (channel, number)
    return torch.tensor([ticket])


def _collect(sent: Tensor, parts: Tensor, columns: list[int], dtype: torch.dtype, turns: bool, size: int, group: str) -> list[Tensor]:
    (channel, number), main = _SENT.pop(int(sent)), torch.cuda.current_stream()
    main.wait_event(channel.events[number % channel.slots])  # this one's parts have left, so their memory may be used again
    for member in channel.others():
        channel.await_(main, member, 0, number + 1)
    me, rows = channel.handle.rank, parts.shape[0] // size
    landed = channel.slot(me, number, (size, rows, sum(columns)), parts.dtype)
    sums = _added(landed, parts.narrow(0, me * rows, rows), me, columns, dtype, turns)
    for member in channel.others():
        channel.tell(main, member, 1, number + 1)
    return sums


def _added(landed: Tensor, own: Tensor, me: int, columns: list[int], dtype: torch.dtype, turns: bool) -> list[Tensor]:
    """Sum what landed, [size, rows, columns], over the members in a type, cut by columns; what ``me`` has did not travel."""
    kernel = nvidia.module("engine_triton")
    if kernel is not None:
        return kernel.sums_in_turn(landed, own, me, dtype) if turns else kernel.sums(landed, own, me, columns, dtype)
    landed[me].copy_(own)
    return [part.sum(0, dtype=dtype) for part in cut(landed, columns, turns)]


def _cast(shards: list[Tensor], out: Tensor, also: Tensor, turns: bool) -> None:
    """Write shards where the peers read them and where this device does: a copy by a kernel would wait for the product beside it."""
    kernel = nvidia.module("engine_triton")
    if kernel is None:
        out.copy_(beside(shards, turns))
        also.copy_(out)
    elif turns:
        kernel.cast_in_turn(*shards, out, also)
    else:
        kernel.cast(shards, out, also)


def _gather_shape(shards: list[Tensor], scale: Tensor | None, dtype: torch.dtype, turns: bool, size: int, group: str) -> Tensor:
    columns = sum(x[0].numel() for x in shards)
    return shards[0].new_empty((size * shards[0].shape[0], columns), dtype=dtype if scale is None else fp8.VALUES)


def _send_shape(parts: Tensor, size: int, group: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu" if parts.device.type != "meta" else "meta")


def _collect_shape(sent: Tensor, parts: Tensor, columns: list[int], dtype: torch.dtype, turns: bool, size: int, group: str) -> list[Tensor]:
    return [parts.new_empty((parts.shape[0] // size, width), dtype=dtype) for width in columns]


def _cpu_gather(shards: list[Tensor], scale: Tensor | None, dtype: torch.dtype, turns: bool, size: int, group: str) -> Tensor:
    flat = [shard.flatten(1) for shard in shards]
    mine = beside([x.to(dtype) for x in flat], turns).contiguous() if scale is None else fp8.side_by_side(flat, scale, dtype)
    out = mine.new_empty((size * mine.shape[0], mine.shape[1]))
    pair = (out, mine) if scale is None else (out.view(torch.uint8), mine.view(torch.uint8))  # gloo knows no 8-bit floats
    dist.all_gather_into_tensor(*pair, group=_c10d._resolve_process_group(group))  # pyright: ignore[reportDeprecated]
    return out


def _cpu_send(parts: Tensor, size: int, group: str) -> Tensor:
    ticket, landed = next(_TICKETS), torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(landed, parts.contiguous(), group=_c10d._resolve_process_group(group))
    _LANDED[ticket] = landed
    return torch.tensor([ticket])


def _cpu_collect(sent: Tensor, parts: Tensor, columns: list[int], dtype: torch.dtype, turns: bool, size: int, group: str) -> list[Tensor]:
    landed = _LANDED.pop(int(sent)).view(size, parts.shape[0] // size, -1)
    return [part.sum(0, dtype=dtype) for part in cut(landed, columns, turns)]


for _name, _gpu, _cpu, _shape in (
    ("gather", _gather, _cpu_gather, _gather_shape),
    ("send", _send, _cpu_send, _send_shape),
    ("collect", _collect, _cpu_collect, _collect_shape),
):
    _library.impl(_name, _gpu, "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"mtl_engine::{_name}", _shape, lib=_library)


def open_channel(kind: str, group: str, size: int) -> Channel:
    """Give the channel of a group, with slots of at least ``size`` bytes: every member asks in the same order, so all grow it together."""
    large = _one_at_a_time(kind, size)
    known = _CHANNELS.get((kind, group, large))
    if known is None or known.bytes < size:
        _CHANNELS[kind, group, large] = known = _open(*slots(kind, size), group, None if known is None else known.stream)
    return known


def _one_at_a_time(kind: str, size: int) -> bool:
    return kind == "gather" and size > LARGE


def slots(kind: str, size: int) -> tuple[int, int]:
    """Give how many slots a channel has whose largest transfer is of ``size`` bytes, and the bytes of each."""
    count = 1 if _one_at_a_time(kind, size) else {"gather": GATHERS, "sum": SUMS}[kind]
    return count, -(-size // PAGE) * PAGE


def room(transfers: Iterable[tuple[str, str, int]]) -> int:
    """Count the bytes of all slots after such transfers, each (gather or sum, group, bytes of a slot): what `held` gives on GPUs."""
    largest: dict[tuple[str, str, bool], int] = {}
    for kind, group, size in transfers:
        key = kind, group, _one_at_a_time(kind, size)
        largest[key] = max(size, largest.get(key, 0))
    pairs = [slots(kind, size) for (kind, _, _), size in largest.items()]
    return sum(count * size + 2 * PAGE for count, size in pairs)


def held() -> int:
    """Count the bytes of all slots of this process, which torch's allocator does not know of."""
    return sum(channel.memory.nbytes for channel in _CHANNELS.values())


def release() -> None:
    """Give all slots back; what sends again opens new ones. Every process does so at the same point, with no transfer under way."""
    if _CHANNELS:
        torch.cuda.synchronize()
        dist.barrier()
        _CHANNELS.clear()


def _open(slots: int, size: int, group: str, stream: torch.cuda.Stream | None) -> Channel:
    torch.cuda.synchronize()
    members: Any = _c10d._resolve_process_group(group)
    dist.barrier(members)  # no member still uses the old memory
    memory = _symmetric.empty(slots * size + 2 * PAGE, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    memory[slots * size :].zero_()
    handle = _symmetric.rendezvous(memory, group)
    torch.cuda.synchronize()
    dist.barrier(members)
    torch.cuda.synchronize()
    events = [torch.cuda.Event() for _ in range(slots)]
    return Channel(slots, size, memory, handle, stream or torch.cuda.Stream(priority=-1), events)
