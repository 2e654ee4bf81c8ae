"""A layout: which mesh axes split each dimension of an array, and over which axes its values still have to be summed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from mtl.axes import MESH_AXES
from mtl.errors import UserError
from mtl.sharding.mesh import Mesh

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """``dims[i]`` are the mesh axes that split dimension i, the first of them the slowest; ``partial`` those with a sum outstanding."""

    dims: tuple[Axes, ...]
    partial: Axes = ()

    def __post_init__(self) -> None:
        """Refuse an axis that is used twice."""
        used = self.used() + self.partial
        for axis in used:
            if used.count(axis) > 1:
                raise UserError(f"mesh axis {axis!r} is used twice in layout {self}: an axis can split one dimension of an array.")

    def used(self) -> Axes:
        """List the axes that split a dimension."""
        return tuple(axis for axes in self.dims for axis in axes)

    def __str__(self) -> str:
        """Spell it: ``[fsdp, -, tensor] partial(context)``."""
        dims = ", ".join("+".join(axes) or "-" for axes in self.dims)
        return f"[{dims}]" + (f" partial({', '.join(self.partial)})" if self.partial else "")


def whole(ndim: int) -> Layout:
    """Give the layout of an array that every device holds whole."""
    return Layout(((),) * ndim)


def box(shape: Sequence[int], layout: Layout, mesh: Mesh) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give this device's part of an array as (offset, shape). A dimension that does not divide is cut in ceil-sized chunks."""
    offset: list[int] = []
    local: list[int] = []
    for size, axes in zip(shape, layout.dims, strict=True):
        chunk = -(-size // mesh.size(axes))
        start = min(chunk * mesh.index(axes), size)
        offset.append(start)
        local.append(min(start + chunk, size) - start)
    return tuple(offset), tuple(local)


def missing_axes(layout: Layout, mesh: Mesh) -> Axes:
    """List the active axes over which an array of this layout is replicated, in mesh order."""
    return tuple(axis for axis in mesh.shape.active() if axis not in layout.used())


def placements(layout: Layout, mesh: Mesh) -> list[Placement]:
    """Say the layout in DTensor's words, for the mesh's active axes."""
    for axes in layout.dims:
        if list(axes) != sorted(axes, key=MESH_AXES.index):
            raise UserError(f"layout {layout} splits a dimension over {axes}: at rest the axes must come in mesh order {MESH_AXES}.")
    found: dict[str, Placement] = {axis: Shard(i) for i, axes in enumerate(layout.dims) for axis in axes}
    found |= {axis: Partial() for axis in layout.partial}
    return [found.get(axis, Replicate()) for axis in mesh.shape.active()] or [Replicate()]
