"""The mesh: how many devices lie along each axis, where this process sits, and the process group of any set of axes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtl.axes import MESH_AXES
from mtl.errors import UserError


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes; one of them may be -1 (the rest of the devices)."""

    pipe: int = 1
    replica: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def sizes(self) -> dict[str, int]:
        """Map axis name to size, in mesh order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def active(self) -> tuple[str, ...]:
        """Name the axes of more than one device, in mesh order."""
        return tuple(name for name, size in self.sizes().items() if size != 1)

    def devices(self) -> int:
        """Count the devices."""
        return math.prod(self.sizes().values())

    def fill(self, world: int) -> "MeshShape":
        """Replace -1 by what is left of ``world`` devices and check that the product fits."""
        sizes = self.sizes()
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"--mesh.{name} is {size}: a mesh axis has at least 1 device, or -1 for the rest.")
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(f"mesh axes {' and '.join(free)} are both -1: only one axis can take the rest of the {world} devices.")
        known = math.prod(size for size in sizes.values() if size != -1)
        if free and world % known == 0:
            sizes[free[0]] = world // known
        if math.prod(sizes.values()) != world:
            need = f"a multiple of {known}" if free else str(known)
            runs = "1 process runs" if world == 1 else f"{world} processes run"
            raise UserError(
                f"the mesh {self} needs {need} devices, but {runs} (one per device). Start as many with torchrun "
                "--nproc-per-node, or change the --mesh sizes; one of them may be -1 (the rest)."
            )
        return MeshShape(**sizes)

    def __str__(self) -> str:
        """Spell the axes that are not 1: ``fsdp=2,tensor=4``."""
        return ",".join(f"{name}={size}" for name, size in self.sizes().items() if size != 1) or "one device"


@dataclass(frozen=True, eq=False)
class Mesh:
    """A mesh of running processes. ``device_mesh`` has the active axes alone (or one axis of size 1)."""

    shape: MeshShape
    device_mesh: DeviceMesh
    coordinates: Mapping[str, int]
    groups: Mapping[tuple[str, ...], str]

    @property
    def device_type(self) -> str:
        """Name the kind of device: cpu, cuda, ..."""
        return self.device_mesh.device_type

    def size(self, axes: Sequence[str]) -> int:
        """Count the devices along some axes."""
        return math.prod(getattr(self.shape, axis) for axis in axes)

    def index(self, axes: Sequence[str]) -> int:
        """Number this device along some axes, the first of them the slowest."""
        number = 0
        for axis in axes:
            number = number * getattr(self.shape, axis) + self.coordinates[axis]
        return number

    def group(self, axes: Sequence[str]) -> str:
        """Name the process group along some active axes, given in mesh order."""
        return self.groups[tuple(axes)]


def make_mesh(shape: MeshShape, device_type: str) -> Mesh:
    """Lay the running processes out as a mesh; every process must call this."""
    active = shape.active()
    sizes = [getattr(shape, axis) for axis in active]
    device_mesh = init_device_mesh(device_type, tuple(sizes) or (1,), mesh_dim_names=active or ("replica",))
    place = cast("list[int]", device_mesh.get_coordinate() or [0])
    coordinates = dict.fromkeys(MESH_AXES, 0) | dict(zip(active, place, strict=False))
    groups: dict[tuple[str, ...], str] = {}
    for count in range(1, len(active) + 1):
        for axes in itertools.combinations(active, count):
            groups[axes] = device_mesh.get_group(axes[0]).group_name if count == 1 else _flat_group(device_mesh, active, axes)
    return Mesh(shape, device_mesh, coordinates, groups)


def _flat_group(device_mesh: DeviceMesh, active: tuple[str, ...], axes: tuple[str, ...]) -> str:
    kept = [active.index(axis) for axis in axes]
    others = [i for i in range(len(active)) if i not in kept]
    rows = device_mesh.mesh.permute(*others, *kept).reshape(-1, math.prod(device_mesh.mesh.shape[i] for i in kept))
    mine, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return cast("dist.ProcessGroup", mine).group_name
