"""The one verb for layout: `reshard` is the only place where a local tensor's layout changes."""

from torch import Tensor

from mtl.axes import MESH_AXES
from mtl.errors import UserError
from mtl.sharding.collectives import all_gather, all_to_all, psum, psum_scatter
from mtl.sharding.layout import Axes, Layout
from mtl.sharding.mesh import Mesh


def reshard(x: Tensor, src: Layout, dst: Layout, mesh: Mesh) -> Tensor:
    """Bring this device's part of an array from layout ``src`` to layout ``dst``.

    What both layouts share at the start of a dimension stays. The rest leaves ``src`` from the fastest axis on: by an all-to-all where the
    axis is the next that another dimension of ``dst`` needs, else by an all-gather. Sums go by psum_scatter or psum; new splits are slices.
    """
    if len(src.dims) != len(dst.dims) or not set(dst.partial) <= set(src.partial):
        raise UserError(f"cannot reshard {src} to {dst}: they differ in dimensions, or the target has a sum that the source has not.")
    now = [list(axes) for axes in src.dims]
    goal = [list(axes) for axes in dst.dims]
    for dim in range(len(now)):
        while now[dim] != goal[dim][: len(now[dim])]:
            tail = _fastest_group(now[dim], goal[dim])
            to = _next_dim(tail, now, goal)
            if to is not None:
                x = all_to_all(x, tail, mesh, split=to, join=dim)
                now[to] += tail
            else:
                x = all_gather(x, tail, mesh, dim)
            del now[dim][len(now[dim]) - len(tail) :]
    left: list[str] = []
    for axis in src.partial:
        to = _next_dim((axis,), now, goal)
        if axis in dst.partial:
            continue
        if to is None:
            left.append(axis)
        else:
            x = psum_scatter(x, (axis,), mesh, to)
            now[to].append(axis)
    x = psum(x, tuple(sorted(left, key=MESH_AXES.index)), mesh)
    for dim, (have, want) in enumerate(zip(now, goal, strict=True)):
        new = tuple(want[len(have) :])
        if new:
            x = shard(x, new, mesh, dim)
    return x


def shard(x: Tensor, axes: Axes, mesh: Mesh, dim: int) -> Tensor:
    """Keep this device's part of a dimension that every device along ``axes`` holds whole."""
    size = x.shape[dim] // mesh.size(axes)
    return x.narrow(dim, size * mesh.index(axes), size)


def _fastest_group(have: list[str], goal: list[str]) -> Axes:
    """Take the longest tail of axes that may leave at once: consecutive, in mesh order and beyond what both layouts share."""
    shared = 0
    while shared < min(len(have), len(goal)) and have[shared] == goal[shared]:
        shared += 1
    start = len(have) - 1
    while start > shared and MESH_AXES.index(have[start - 1]) < MESH_AXES.index(have[start]):
        start -= 1
    return tuple(have[start:])


def _next_dim(axes: Axes, now: list[list[str]], goal: list[list[str]]) -> int | None:
    """Find the dimension whose next axes to add are exactly these."""
    for dim, (have, want) in enumerate(zip(now, goal, strict=True)):
        if want[: len(have)] == have and tuple(want[len(have) : len(have) + len(axes)]) == axes:
            return dim
    return None
