"""Differentiable collectives over mesh axes. Each one's derivative is its exact transpose.

The form is the one that works under torch.func and torch.compile alike: forward calls the raw functional op, backward applies the dual
Function, and what the program calls is ``allow_in_graph``. A step's loss is the sum over devices of what each one returns, so psum is its
own transpose.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mtl.sharding.layout import Axes
from mtl.sharding.mesh import Mesh

EXCHANGED = 8
"""Up to this many devices, which one host holds, 16-bit values travel as they are and are summed in float32 where they arrive."""

_ops: Any = torch.ops._c10d_functional  # pyright: ignore[reportPrivateUsage]
_dynamo: Any = torch._dynamo  # pyright: ignore[reportPrivateUsage]


def all_gather(x: Tensor, axes: Axes, mesh: Mesh, dim: int = 0) -> Tensor:
    """Join the parts that lie along ``axes`` at dimension ``dim``."""
    return x if mesh.size(axes) == 1 else gather(x, dim, mesh.size(axes), mesh.group(axes))


def psum_scatter(x: Tensor, axes: Axes, mesh: Mesh, dim: int = 0) -> Tensor:
    """Sum over ``axes`` and keep this device's part of dimension ``dim``. 16-bit values are summed in float32 and rounded once."""
    return x if mesh.size(axes) == 1 else psum_scatter_over(x, dim, mesh.size(axes), mesh.group(axes))


def psum(x: Tensor, axes: Axes, mesh: Mesh) -> Tensor:
    """Sum over ``axes``."""
    return x if mesh.size(axes) == 1 else _psum(x, mesh.group(axes))


def pmax(x: Tensor, axes: Axes, mesh: Mesh) -> Tensor:
    """Take the maximum over ``axes``; a constant to derivatives."""
    return x if mesh.size(axes) == 1 else _pmax(x, mesh.group(axes))


def all_to_all(x: Tensor, axes: Axes, mesh: Mesh, split: int, join: int) -> Tensor:
    """Split dimension ``split`` over ``axes`` and join the parts of dimension ``join``."""
    return x if mesh.size(axes) == 1 else _all_to_all(x, split, join, mesh.size(axes), mesh.group(axes))


def permute(x: Tensor, axes: Axes, mesh: Mesh, shift: int = 1) -> Tensor:
    """Send ``x`` to the device ``shift`` places further along ``axes`` (a ring) and take what comes from behind."""
    return x if mesh.size(axes) == 1 else _permute(x, shift, mesh.index(axes), mesh.size(axes), mesh.group(axes))


def gather_raw(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Gather without a derivative: the piece that Functions are made of."""
    return gather_end(gather_start(x, size, group), dim, size)


def gather_start(x: Tensor, size: int, group: str) -> Tensor:
    """Start a gather; `gather_end` gives its result."""
    return _ops.all_gather_into_tensor(x.contiguous(), size, group)


def gather_end(started: Tensor, dim: int, size: int) -> Tensor:
    """Wait for a gather that was started, and join the parts at a dimension."""
    out = wait(started)
    return out if dim == 0 else out.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def scatter_raw(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Sum and scatter without a derivative: the piece that Functions are made of."""
    return wait(_ops.reduce_scatter_tensor(_by_member(x, dim, size), "sum", size, group))


def exchange_sum_raw(x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype) -> Tensor:
    """Sum and scatter without a derivative: parts travel in the type they have and are summed in ``dtype`` where they arrive."""
    x = _by_member(x, dim, size)
    rows = [x.shape[0] // size] * size
    parts = exchange_raw(x, rows, rows, group)
    return parts.unflatten(0, (size, -1)).sum(0, dtype=dtype)


def scatter_start(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Start what `psum_scatter` does; `scatter_end` gives its result."""
    x = _by_member(x, dim, size)
    if not _exchanged(x, size):
        return _ops.reduce_scatter_tensor(x, "sum", size, group)
    rows = [x.shape[0] // size] * size
    return _ops.all_to_all_single(x, rows, rows, group)


def scatter_end(started: Tensor, size: int) -> Tensor:
    """Wait for a sum that `scatter_start` started."""
    out = wait(started)
    return out.unflatten(0, (size, -1)).sum(0, dtype=torch.float32).to(out.dtype) if _exchanged(out, size) else out


def permute_start(x: Tensor, shift: int, index: int, size: int, group: str) -> Tensor:
    """Start a permute without a derivative; the result may be read after `wait`."""
    send, receive = ([0] * size for _ in range(2))
    send[(index + shift) % size] = x.shape[0]
    receive[(index - shift) % size] = x.shape[0]
    return _ops.all_to_all_single(x.contiguous(), receive, send, group)


def exchange_raw(x: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
    """Send the next ``send[i]`` rows to member i and take ``receive[i]`` rows from it, without a derivative."""
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), receive, send, group))


def wait(x: Tensor) -> Tensor:
    """Wait for a collective that was started."""
    return _ops.wait_tensor(x)


def _by_member(x: Tensor, dim: int, size: int) -> Tensor:
    """Bring the parts of a dimension that go to each member of a group one after the other."""
    return (x if dim == 0 else x.unflatten(dim, (size, -1)).movedim(dim, 0).flatten(0, 1)).contiguous()


def _exchanged(x: Tensor, size: int) -> bool:
    return x.dtype.itemsize == 2 and size <= EXCHANGED


class _AllGather(Function):
    @staticmethod
    def forward(x: Tensor, dim: int, size: int, group: str) -> Tensor:
        return gather_raw(x, dim, size, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _PsumScatter.apply(grad, *ctx.args), None, None, None


class _PsumScatter(Function):
    @staticmethod
    def forward(x: Tensor, dim: int, size: int, group: str) -> Tensor:
        return scatter_end(scatter_start(x, dim, size, group), size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllGather.apply(grad, *ctx.args), None, None, None


class _Psum(Function):
    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Psum.apply(grad, ctx.group), None


class _AllToAll(Function):
    @staticmethod
    def forward(x: Tensor, split: int, join: int, size: int, group: str) -> Tensor:
        x = x.unflatten(split, (size, -1)).movedim(split, 0).contiguous()
        rows = [x.shape[0] // size] * size
        x = _ops.wait_tensor(_ops.all_to_all_single(x, rows, rows, group))
        return x.movedim(0, join).flatten(join, join + 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        split, join, size, group = ctx.args
        return _AllToAll.apply(grad, join, split, size, group), None, None, None, None


class _Permute(Function):
    @staticmethod
    def forward(x: Tensor, shift: int, index: int, size: int, group: str) -> Tensor:
        return wait(permute_start(x, shift, index, size, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shift, index, size, group = ctx.args
        return _Permute.apply(grad, -shift, index, size, group), None, None, None, None


class _Pmax(Function):
    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "max", group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.zeros_like(grad), None


@_dynamo.allow_in_graph
def gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Join the parts that the members of a group hold at a dimension."""
    return _AllGather.apply(x, dim, size, group)


@_dynamo.allow_in_graph
def psum_scatter_over(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Sum over the members of a group, each of which keeps its part of a dimension."""
    return _PsumScatter.apply(x, dim, size, group)


@_dynamo.allow_in_graph
def _psum(x: Tensor, group: str) -> Tensor:
    return _Psum.apply(x, group)


@_dynamo.allow_in_graph
def _pmax(x: Tensor, group: str) -> Tensor:
    return _Pmax.apply(x, group)


@_dynamo.allow_in_graph
def _all_to_all(x: Tensor, split: int, join: int, size: int, group: str) -> Tensor:
    return _AllToAll.apply(x, split, join, size, group)


@_dynamo.allow_in_graph
def _permute(x: Tensor, shift: int, index: int, size: int, group: str) -> Tensor:
    return _Permute.apply(x, shift, index, size, group)
