"""Where every byte of an array lives: its parts, who holds them, and the table of a model's parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mtl import tree
from mtl.axes import LETTERS, MESH_AXES, names
from mtl.errors import unknown
from mtl.inspect.mesh import coordinates, number, planned_mesh, splits
from mtl.precision import Precision
from mtl.sharding.layout import Axes, Layout, box
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules


@dataclass(frozen=True)
class Array:
    """One array on a mesh: ``letters`` name its dimensions, ``layout`` says how it rests."""

    path: str
    letters: str
    shape: tuple[int, ...]
    layout: Layout
    mesh: MeshShape

    def notation(self) -> str:
        """Spell it as the scaling book does: each dimension's letter with the mesh axes that split it, ``[L, D_fsdp, H_tensor, K]``."""
        return notation(self.letters, self.layout)

    def parts(self) -> int:
        """Count the different parts."""
        return splits(self.mesh, self.layout.used())

    def copies(self) -> int:
        """Count the devices that hold the same part."""
        return self.mesh.devices() // self.parts()

    def slot(self, device: int) -> tuple[int, ...]:
        """Number the part that a device holds, along each dimension."""
        place = coordinates(self.mesh, device)
        return tuple(_index(self.mesh, axes, place) for axes in self.layout.dims)

    def box(self, device: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Give a device's part as (offset, shape)."""
        return box(self.shape, self.layout, planned_mesh(self.mesh, device))

    def holders(self, slot: Sequence[int]) -> Iterator[int]:
        """List the devices that hold one part, in order."""
        fixed: dict[str, int] = {}
        for axes, index in zip(self.layout.dims, slot, strict=True):
            left = index
            for axis in reversed(axes):
                left, fixed[axis] = divmod(left, getattr(self.mesh, axis))
        free = [axis for axis in MESH_AXES if axis not in fixed and getattr(self.mesh, axis) > 1]
        for i in range(splits(self.mesh, free)):
            yield number(self.mesh, {**fixed, **_unravel(self.mesh, free, i)})


@dataclass(frozen=True)
class Row:
    """A parameter as one device sees it.

    ``rest_bytes`` count its own type; ``gathered_bytes`` the array as products use it, ``layer_bytes`` one layer of that.
    """

    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    rest: Layout
    use: Layout
    notation: str
    offset: tuple[int, ...]
    local: tuple[int, ...]
    rest_bytes: int
    gathered_bytes: int
    layer_bytes: int
    copies: int
    flagged: bool = False


@dataclass(frozen=True)
class Table:
    """All parameters of a model on one device, and how much of it other devices hold as well."""

    rows: tuple[Row, ...]
    device: int
    mesh: MeshShape
    rules: str
    share: float

    @property
    def rest_bytes(self) -> int:
        """Sum the bytes at rest on the device."""
        return sum(row.rest_bytes for row in self.rows)

    @property
    def replicated_bytes(self) -> int:
        """Sum the bytes at rest on the device that another device holds too."""
        return sum(row.rest_bytes for row in self.rows if row.copies > 1)


def table(specs: tree.Tree, rules: Rules, mesh: MeshShape, precision: Precision, device: int = 0, share: float = 0.05) -> Table:
    """Lay out every parameter. A row is flagged where it is replicated and more than ``share`` of the device's bytes at rest."""
    here = planned_mesh(mesh, device)
    rows: list[Row] = []
    for path, spec in tree.paths(specs):
        rest, use = (rules.layout(t, names(spec.axes), spec.shape, mesh, f"parameter {path!r}") for t in ("store", "compute"))
        offset, local = box(spec.shape, rest, here)
        gathered = [-(-n // splits(mesh, axes)) for n, axes in zip(spec.shape, use.dims, strict=True)]
        copies = mesh.devices() // splits(mesh, rest.used())
        held, used = math.prod(local) * precision.param.itemsize, math.prod(gathered) * precision.compute.itemsize
        sizes = held, used, used // (spec.shape[0] if spec.axes.startswith("L") else 1)
        spelled = notation(spec.axes, rest)
        rows.append(Row(path, names(spec.axes), spec.shape, rest, use, spelled, offset, local, *sizes, copies))
    total = sum(row.rest_bytes for row in rows)
    marked = (replace(r, flagged=r.copies > 1 and r.rest_bytes > share * total) for r in rows)
    return Table(tuple(marked), device, mesh, rules.name, share)


def find_array(name: str, specs: tree.Tree, rules: Rules, mesh: MeshShape, sizes: Mapping[str, int], table: str = "store") -> Array:
    """Find a parameter by its path, or an activation by its letters (``BRD``), with the layout that the rules give it."""
    params = dict(tree.paths(specs))
    if name in params:
        spec = params[name]
        layout = rules.layout(table, names(spec.axes), spec.shape, mesh, f"parameter {name!r}")
        return Array(name, spec.axes, spec.shape, layout, mesh)
    if name and all(c in LETTERS and LETTERS[c] in sizes for c in name):
        shape = tuple(sizes[axis] for axis in names(name))
        return Array(name, name, shape, rules.layout("act", names(name), shape, mesh, f"activation {name!r}"), mesh)
    raise unknown("array (a parameter's path, or letters of an activation such as BRD)", name, params)


def notation(letters: str, layout: Layout) -> str:
    """Spell a layout with the array's letters: ``[L, D_fsdp, H_tensor, K]``; several axes as ``D_{fsdp,context}``."""

    def dim(letter: str, axes: Axes) -> str:
        return letter + ("" if not axes else f"_{axes[0]}" if len(axes) == 1 else "_{" + ",".join(axes) + "}")

    spelled = ", ".join(dim(c, axes) for c, axes in zip(letters, layout.dims, strict=True))
    return f"[{spelled}]" + (" {sum over " + ",".join(layout.partial) + "}" if layout.partial else "")


def _index(mesh: MeshShape, axes: Axes, place: Mapping[str, int]) -> int:
    index = 0
    for axis in axes:
        index = index * getattr(mesh, axis) + place[axis]
    return index


def _unravel(mesh: MeshShape, axes: Sequence[str], index: int) -> dict[str, int]:
    place: dict[str, int] = {}
    for axis in reversed(axes):
        index, place[axis] = divmod(index, getattr(mesh, axis))
    return place
