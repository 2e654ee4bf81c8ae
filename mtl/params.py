"""Parameters are declared once, as `ParamSpec`; init, layouts, abstract trees and tables are maps over the spec tree."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import random, tree
from mtl.axes import names
from mtl.sharding.layout import box
from mtl.sharding.mesh import Mesh, MeshShape
from mtl.sharding.rules import Rules
from mtl.sharding.shard_map import to_global

_CHUNK = 1 << 22
"""Random numbers are drawn this many at a time, so that the int64 work space stays under 200 MB."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, its axes as letters of `mtl.axes.LETTERS`, and its initial value.

    ``std`` is the standard deviation of a normal distribution; without one every element starts at ``fill``.
    """

    shape: tuple[int, ...]
    axes: str
    std: float | None = None
    fill: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a shape and axes of different length."""
        if len(self.shape) != len(self.axes):
            raise ValueError(f"ParamSpec: shape {self.shape} and axes {self.axes!r} differ in length")


def layouts(specs: tree.Tree, rules: Rules, mesh: MeshShape, table: str = "store") -> tree.Tree:
    """Place every parameter by the store or compute table; the first that cannot be placed is an error with its path."""
    return tree.map_paths(lambda path, s: rules.layout(table, names(s.axes), s.shape, mesh, f"parameter {path!r}"), specs)


def init(specs: tree.Tree, rules: Rules, mesh: Mesh, seed: int, dtype: torch.dtype) -> tree.Tree:
    """Make the parameters as DTensors. The values depend on (seed, path, global index) alone, so every mesh gets the same bits."""

    def make(path: str, spec: ParamSpec) -> DTensor:
        layout = rules.layout("store", names(spec.axes), spec.shape, mesh.shape, f"parameter {path!r}")
        offset, shape = box(spec.shape, layout, mesh)
        local = init_box(spec, random.key(seed, path), offset, shape, dtype, torch.device(mesh.device_type))
        return to_global(local, spec.shape, layout, mesh)

    return tree.map_paths(make, specs)


def init_box(
    spec: ParamSpec, key: int, offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Make the part of one parameter that starts at ``offset`` and has ``shape``."""
    if device.type == "mps":  # which has no float64
        return init_box(spec, key, offset, shape, dtype, torch.device("cpu")).to(device)
    out = torch.full(shape, spec.fill, dtype=dtype, device=device)
    if spec.std is not None:
        for corner, part in _pieces(out, offset):
            part.copy_(random.normal(key, random.global_index(part.shape, corner, spec.shape, device)) * spec.std)
    return out


def abstract(specs: tree.Tree, dtype: torch.dtype) -> tree.Tree:
    """Make the parameter tree without memory, as meta tensors of global shape."""
    return tree.map(lambda s: torch.empty(s.shape, dtype=dtype, device="meta"), specs)


def in_type(specs: tree.Tree, params: tree.Tree, dtype: torch.dtype) -> tree.Tree:
    """Bring weights of products to the type that they are used in, once; what computes in a wider type (norms) stays as it is."""
    return tree.map(lambda s, p: p.to(dtype) if is_product(s) else p, specs, params)


def is_product(spec: ParamSpec) -> bool:
    """Tell whether a parameter is a weight of products, used in their type; what is not (norms, biases) computes in a wider one."""
    return len(spec.axes.replace("L", "")) > 1


def count(specs: tree.Tree) -> int:
    """Count the elements of all parameters."""
    return sum(math.prod(s.shape) for s in tree.leaves(specs))


def table(specs: tree.Tree, rules: Rules, mesh: MeshShape, itemsize: int = 4) -> str:
    """Draw one line a parameter: path, axes, shape, layout at rest, and bytes on one device."""
    rows = [("parameter", "axes", "shape", "at rest", "MiB a device")]
    for (path, spec), layout in zip(tree.paths(specs), tree.leaves(layouts(specs, rules, mesh)), strict=True):
        parts = math.prod(getattr(mesh, axis) for axis in layout.used())
        size = math.prod(spec.shape) * itemsize / parts / 2**20
        rows.append((path, " ".join(names(spec.axes)), "x".join(str(n) for n in spec.shape), str(layout), f"{size:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def decayed(specs: tree.Tree) -> tree.Tree:
    """Say which parameters weight decay applies to: those with two axes or more besides the layers, but no biases."""
    bias = {"HK", "GK"}
    return tree.map(lambda s: len(s.axes.replace("L", "")) > 1 and s.axes.replace("L", "") not in bias, specs)


def _pieces(x: Tensor, offset: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Cut a tensor into views of at most _CHUNK elements, along its first dimensions."""
    if x.numel() <= _CHUNK or x.dim() == 0:
        if x.numel():
            yield offset, x
        return
    rows = max(1, _CHUNK // max(1, x[0].numel()))
    if x[0].numel() > _CHUNK:
        for i in range(x.shape[0]):
            for corner, part in _pieces(x[i], offset[1:]):
                yield (offset[0] + i, *corner), part.unsqueeze(0)
        return
    for start in range(0, x.shape[0], rows):
        yield (offset[0] + start, *offset[1:]), x[start : start + rows]
