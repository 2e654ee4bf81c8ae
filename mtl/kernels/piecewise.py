"""Products taken in pieces beside the copies that feed them or carry them away: tensor parallelism that does not wait for its links.

A gathered product multiplies this device's part of the sequence while the others' parts arrive, each then as it comes. A summed product
multiplies what the others take first and sends it while the next piece is made; its own piece is last. Copy engines do the moving
(`mtl.kernels.copy_engine`), so it takes no multiprocessor from the products. What arrives is summed in float32 in the members' order and
rounded once, as `psum_scatter` does. Activations are [B, S, columns], the sequence S being split over the members of a group. On a CPU the
same schedule runs over gloo.
"""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtl.kernels.copy_engine import open_channel

_symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")
_c10d: Any = importlib.import_module("torch._C._distributed_c10d")
_library: Any = torch.library.Library("mtl_engine", "FRAGMENT")
_library.define("gather_product(Tensor part, Tensor matrix, bool turned, int size, str group) -> (Tensor, Tensor)")
_library.define("gather_rows(Tensor part, int size, str group) -> Tensor")
_library.define("product_send(Tensor rows, Tensor matrix, bool turned, int size, str group) -> Tensor")
_library.define("product_take(Tensor sent, Tensor rows, int columns, int size, str group) -> Tensor")


@dataclass(frozen=True)
class _Pull:
    """A gather under way: what waits till the own part has been read, till each member's is there, in the order they come, and the end."""

    offered: Callable[[], None]
    arrivals: list[tuple[int, Callable[[], None]]]
    end: Callable[[], None]


def gather_product(part: Tensor, matrix: Tensor, turned: bool, size: int, group: str) -> tuple[Tensor, Tensor]:
    """Gather parts [B, S / size, K], multiply by a matrix [K, N], or [N, K] to be turned: gives [B, S, N] and the whole [B, S, K]."""
    return torch.ops.mtl_engine.gather_product(part, matrix, turned, size, group)  # pyright: ignore


def gather_rows(part: Tensor, size: int, group: str) -> Tensor:
    """Start to gather parts [B, S / size, K]; `wait_tensor` ends it."""
    return torch.ops.mtl_engine.gather_rows(part, size, group)  # pyright: ignore


def product_send(rows: Tensor, matrix: Tensor, turned: bool, size: int, group: str) -> Tensor:
    """Multiply [B, S, K] by a matrix [K, N], or [N, K] to be turned, and send each member its part; `product_take` ends it."""
    return torch.ops.mtl_engine.product_send(rows, matrix, turned, size, group)  # pyright: ignore


def product_take(sent: Tensor, rows: Tensor, columns: int, size: int, group: str) -> Tensor:
    """Sum what the members sent of a product of ``rows``, which has so many columns: [B, S / size, N]."""
    return torch.ops.mtl_engine.product_take(sent, rows, columns, size, group)  # pyright: ignore


class _Sum(Protocol):
    """A sum under way: the others' pieces leave, and theirs of this device's part land."""

    own: Tensor

    def push(self, member: int, piece: Tensor) -> None: ...

    def total(self) -> Tensor: ...


_SENT: dict[int, _Sum] = {}
_TICKETS = itertools.count()


def _gather_product(part: Tensor, matrix: Tensor, turned: bool, size: int, group: str) -> tuple[Tensor, Tensor]:
    w, me, length = _turned(matrix, turned), _rank(group), part.shape[1]
    part, whole, y = part.contiguous(), _spread(part, part.shape[2], size), _spread(part, w.shape[1], size)
    pull = _pull(part, whole, group)
    _multiply(part, w, _piece(y, me, length))
    for member, arrived in pull.arrivals:
        arrived()
        _multiply(_piece(whole, member, length), w, _piece(y, member, length))
    pull.end()
    return y, whole


def _gather_rows(part: Tensor, size: int, group: str) -> Tensor:
    whole = _spread(part, part.shape[2], size)
    pull = _pull(part.contiguous(), whole, group)
    pull.offered()
    if part.is_cuda:
        with torch.cuda.stream(open_channel("gather", group, part.nbytes).stream):
            _c10d._register_work(whole, _symmetric.Work())
        return whole
    for _, arrived in pull.arrivals:
        arrived()
    pull.end()
    return whole


def _product_send(rows: Tensor, matrix: Tensor, turned: bool, size: int, group: str) -> Tensor:
    w, me, length = _turned(matrix, turned), _rank(group), rows.shape[1] // size
    shape = (rows.shape[0], length, w.shape[1])
    rows = rows.contiguous()
    under_way: _Sum = (_DeviceSum if rows.is_cuda else _HostSum)(rows, shape, size, group)
    for member in _others(me, size):
        piece = rows.new_empty(shape)
        _multiply(_piece(rows, member, length), w, piece)
        under_way.push(member, piece)
    _multiply(_piece(rows, me, length), w, under_way.own)
    ticket = next(_TICKETS)
    _SENT[ticket] = under_way
    return torch.tensor([ticket])


def _product_take(sent: Tensor, rows: Tensor, columns: int, size: int, group: str) -> Tensor:
    return _SENT.pop(int(sent)).total()


def _gather_product_shape(part: Tensor, matrix: Tensor, turned: bool, size: int, group: str) -> tuple[Tensor, Tensor]:
    return _spread(part, matrix.shape[0 if turned else 1], size), _spread(part, part.shape[2], size)


def _gather_rows_shape(part: Tensor, size: int, group: str) -> Tensor:
    return _spread(part, part.shape[2], size)


def _product_send_shape(rows: Tensor, matrix: Tensor, turned: bool, size: int, group: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu" if rows.device.type != "meta" else "meta")


def _product_take_shape(sent: Tensor, rows: Tensor, columns: int, size: int, group: str) -> Tensor:
    return rows.new_empty((rows.shape[0], rows.shape[1] // size, columns))


for _name, _run, _shape in (
    ("gather_product", _gather_product, _gather_product_shape),
    ("gather_rows", _gather_rows, _gather_rows_shape),
    ("product_send", _product_send, _product_send_shape),
    ("product_take", _product_take, _product_take_shape),
):
    _library.impl(_name, _run, "CUDA")
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"mtl_engine::{_name}", _shape, lib=_library)


def _pull(part: Tensor, whole: Tensor, group: str) -> _Pull:
    """Start to bring all members' parts into the whole."""
    return (_device_pull if part.is_cuda else _host_pull)(part, whole, group)


def _device_pull(part: Tensor, whole: Tensor, group: str) -> _Pull:
    """Offer the part in memory that the members see, and take theirs, all on the channel's stream."""
    channel, main, length = open_channel("gather", group, part.nbytes), torch.cuda.current_stream(), part.shape[1]
    me, number, stream = channel.handle.rank, channel.count, channel.stream
    channel.count += 1
    arrivals: list[tuple[int, Callable[[], None]]] = []
    stream.wait_stream(main)  # the part is made, and the whole's memory is free
    with torch.cuda.stream(stream):
        if number >= channel.slots:
            for member in channel.others():
                channel.await_(stream, member, 1, number - channel.slots + 1)
        mine = channel.slot(me, number, tuple(part.shape), part.dtype)
        mine.copy_(part)
        offered = _wait_for(stream)
        for member in channel.others():
            channel.tell(stream, member, 0, number + 1)
        for member in channel.others():
            channel.await_(stream, member, 0, number + 1)
            _copy(channel.slot(member, number, tuple(part.shape), part.dtype), _piece(whole, member, length))
            channel.tell(stream, member, 1, number + 1)
            arrivals.append((member, _wait_for(stream)))
        _copy(mine, _piece(whole, me, length))
        return _Pull(offered, arrivals, _wait_for(stream))


def _wait_for(stream: torch.cuda.Stream) -> Callable[[], None]:
    """Mark what a stream has been given so far: gives what lets the current stream wait for it."""
    event = stream.record_event()
    return lambda: torch.cuda.current_stream().wait_event(event)


def _host_pull(part: Tensor, whole: Tensor, group: str) -> _Pull:
    members, me, length = _c10d._resolve_process_group(group), _rank(group), part.shape[1]
    others = _others(me, whole.shape[1] // length)
    sends = [dist.isend(part, dist.get_global_rank(members, member), members) for member in others]

    def arrival(member: int) -> tuple[int, Callable[[], None]]:
        landed = torch.empty_like(part)
        work = dist.irecv(landed, dist.get_global_rank(members, member), members)

        def arrived() -> None:
            _finish(work)
            _piece(whole, member, length).copy_(landed)

        return member, arrived

    def end() -> None:
        for work in sends:
            _finish(work)

    _piece(whole, me, length).copy_(part)
    return _Pull(lambda: None, [arrival(member) for member in others], end)


class _DeviceSum:
    """Pieces are copied into the members' memory on the channel's stream; the own piece is multiplied right into this one's."""

    def __init__(self, rows: Tensor, shape: tuple[int, ...], size: int, group: str) -> None:
        self.channel = channel = open_channel("sum", group, size * shape[0] * shape[1] * shape[2] * rows.dtype.itemsize)
        self.number, self.me = channel.count, channel.handle.rank
        channel.count += 1
        self.shape, self.dtype = (size, *shape), rows.dtype
        self.landed = channel.slot(self.me, self.number, self.shape, self.dtype)
        self.own = self.landed[self.me]
        self.pieces: list[Tensor] = []

    def push(self, member: int, piece: Tensor) -> None:
        channel, stream = self.channel, self.channel.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if self.number >= channel.slots:
                channel.await_(stream, member, 1, self.number - channel.slots + 1)
            channel.slot(member, self.number, self.shape, self.dtype)[self.me].copy_(piece)
            channel.tell(stream, member, 0, self.number + 1)
            self.left = stream.record_event()
        self.pieces.append(piece)  # its memory stays until `total` has waited for its leaving

    def total(self) -> Tensor:
        channel, main = self.channel, torch.cuda.current_stream()
        for member in channel.others():
            channel.await_(main, member, 0, self.number + 1)
        y = _total(self.landed)
        for member in channel.others():
            channel.tell(main, member, 1, self.number + 1)
        main.wait_event(self.left)
        return y


class _HostSum:
    """The same over gloo."""

    def __init__(self, rows: Tensor, shape: tuple[int, ...], size: int, group: str) -> None:
        self.members, me = _c10d._resolve_process_group(group), _rank(group)
        self.landed = rows.new_empty((size, *shape))
        self.own = self.landed[me]
        self.works = [dist.irecv(self.landed[i], dist.get_global_rank(self.members, i), self.members) for i in _others(me, size)]
        self.pieces: list[Tensor] = []

    def push(self, member: int, piece: Tensor) -> None:
        self.works.append(dist.isend(piece, dist.get_global_rank(self.members, member), self.members))
        self.pieces.append(piece)

    def total(self) -> Tensor:
        for work in self.works:
            _finish(work)
        return _total(self.landed)


def _total(parts: Tensor) -> Tensor:
    """Sum over the first dimension; 16-bit values are added in float32 and rounded once, which both operations do by themselves."""
    return parts[0] + parts[1] if parts.shape[0] == 2 else parts.sum(0)


def _multiply(x: Tensor, w: Tensor, out: Tensor) -> None:
    """Multiply [B, s, K] by [K, N] into [B, s, N], in one launch and without a copy where the samples' rows lie apart."""
    if x.shape[0] == 1:
        torch.mm(x[0], w, out=out[0])
    else:
        torch.bmm(x, w.expand(x.shape[0], -1, -1), out=out)


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy sample by sample: each is one stretch of memory, which copy engines take; a kernel would copy all at once."""
    for a, b in zip(source, target, strict=True):
        b.copy_(a)


def _turned(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.t() if turned else matrix


def _spread(part: Tensor, columns: int, size: int) -> Tensor:
    return part.new_empty((part.shape[0], size * part.shape[1], columns))


def _piece(whole: Tensor, member: int, length: int) -> Tensor:
    return whole.narrow(1, member * length, length)


def _rank(group: str) -> int:
    return dist.get_rank(_c10d._resolve_process_group(group))


def _others(me: int, size: int) -> list[int]:
    """List the other members, each one starting with the next, so that no two send to the same one at once."""
    return [(me + step) % size for step in range(1, size)]


def _finish(work: Any) -> None:
    assert work is not None
    work.wait()
