"""A mesh without processes: which device is where, as arithmetic on sizes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mtl.axes import MESH_AXES
from mtl.errors import UserError, unknown
from mtl.sharding.mesh import Mesh, MeshShape


@dataclass(frozen=True, eq=False)
class PlannedMesh(Mesh):
    """A mesh of devices that need not exist, seen from one of them. Its groups are named by their axes."""

    kind: str = "meta"

    @property
    def device_type(self) -> str:
        """Name the kind of device that stands for this one."""
        return self.kind


def planned_mesh(shape: MeshShape, device: int = 0, kind: str = "meta") -> PlannedMesh:
    """Look at a mesh from one of its devices; nothing is started."""
    active = shape.active()
    groups = {axes: "+".join(axes) for n in range(1, len(active) + 1) for axes in itertools.combinations(active, n)}
    return PlannedMesh(shape, cast(Any, None), coordinates(shape, device), groups, kind)


def coordinates(shape: MeshShape, device: int) -> dict[str, int]:
    """Say where a device lies along each axis. Devices are numbered in mesh order, the last axis fastest, as ranks are."""
    if not 0 <= device < shape.devices():
        raise UserError(f"device {device} is not on the mesh {shape}: it has devices 0 to {shape.devices() - 1}.")
    place: dict[str, int] = {}
    for axis in reversed(MESH_AXES):
        device, place[axis] = divmod(device, getattr(shape, axis))
    return {axis: place[axis] for axis in MESH_AXES}


def number(shape: MeshShape, place: Mapping[str, int]) -> int:
    """Number the device at these coordinates; an axis that is not given counts as 0."""
    index = 0
    for axis in MESH_AXES:
        index = index * getattr(shape, axis) + place.get(axis, 0)
    return index


def members(shape: MeshShape, axes: Sequence[str], device: int = 0) -> list[int]:
    """List the devices that talk with one of them along some axes, itself included, in order."""
    here = coordinates(shape, device)
    places = itertools.product(*(range(getattr(shape, axis)) for axis in axes))
    return [number(shape, {**here, **dict(zip(axes, place, strict=True))}) for place in places]


def parse_mesh(text: str) -> MeshShape:
    """Read ``fsdp=64,tensor=8``; an empty text is one device."""
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, equals, size = (p.strip() for p in part.partition("="))
        if axis not in MESH_AXES:
            raise unknown("mesh axis", axis, MESH_AXES)
        if not equals or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh has {part!r}: expected AXIS=SIZE with a size of at least 1, such as fsdp=64,tensor=8.")
        if axis in sizes:
            raise UserError(f"--mesh names {axis} twice: {text!r}.")
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def splits(shape: MeshShape, axes: Sequence[str]) -> int:
    """Count the parts that some axes cut a dimension into."""
    return math.prod(getattr(shape, axis) for axis in axes)
