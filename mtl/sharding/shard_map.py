"""The border between global and local: DTensors outside, plain local tensors inside."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import tree
from mtl.sharding.layout import Layout, box, placements
from mtl.sharding.mesh import Mesh


def to_global(local: Tensor, shape: Sequence[int], layout: Layout, mesh: Mesh) -> DTensor:
    """Wrap this device's part of an array of ``shape`` as a DTensor; nothing is sent."""
    want = box(shape, layout, mesh)[1]
    if tuple(local.shape) != want:
        raise ValueError(f"local shape {tuple(local.shape)} is not this device's part {want} of {tuple(shape)} in layout {layout}")
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, mesh.device_mesh, placements(layout, mesh), run_check=False, shape=torch.Size(shape), stride=stride)


def to_local(x: DTensor | Tensor) -> Tensor:
    """Take this device's part of a DTensor: the same memory, nothing is sent."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard_map(fn: Callable[..., Any], mesh: Mesh, in_layouts: Sequence[Any], out_layouts: Any) -> Callable[..., Any]:
    """Run a function of local tensors on DTensors, as JAX's shard_map does.

    ``in_layouts`` has one tree of layouts an argument (checked against what comes); ``out_layouts`` is the result's tree. Result shapes
    follow from the local shapes, whose split dimensions must divide.
    """

    def unwrap(layout: Layout, x: DTensor) -> Tensor:
        want = placements(layout, mesh)
        if list(x.placements) != want:
            raise ValueError(f"shard_map got an array placed {x.placements}, but its layout says {want}")
        return x.to_local()

    def wrap(layout: Layout, x: Tensor) -> DTensor:
        shape = [size * mesh.size(axes) for size, axes in zip(x.shape, layout.dims, strict=True)]
        return to_global(x, shape, layout, mesh)

    def run(*args: Any) -> Any:
        local = [tree.map(unwrap, layouts, arg) for layouts, arg in zip(in_layouts, args, strict=True)]
        return tree.map(wrap, out_layouts, fn(*local))

    return run
