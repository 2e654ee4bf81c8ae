"""`Parallel`: a mesh, rules and the sizes of the logical axes. What model code asks for layouts, by letters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mtl import axes as legend
from mtl.sharding import reshard as verbs
from mtl.sharding.layout import Axes, Layout
from mtl.sharding.mesh import Mesh
from mtl.sharding.rules import Rules


@dataclass(frozen=True, eq=False)
class Parallel:
    """Everything a pure function needs to know of where it runs.

    ``sizes`` maps logical axes to global sizes; ``reduce`` is the type of gradients on the wire. With ``regather`` a gathered weight is
    dropped after use and gathered again in backward; without, it is kept, as inside what is computed again in backward anyway.
    With ``parts`` an activation that a product gathers is kept in parts, and gathered again in backward; without, it is kept whole.
    With ``late`` what backward gathers or computes again is made to wait for the gradient: a compiler that cuts forward from backward
    would else do it ahead, and keep it. With ``engine`` the GPUs' copy engines move weights and their gradients: every group that gathers
    must be on one host; with ``piecewise`` they also serve tensor-parallel products, which are taken in pieces beside what they move. With
    ``fp8`` the layers' projections are multiplied in 8 bits, with one scale a side or one a row; else with
    ``quack``, which is how many multiprocessors a GPU has, quack multiplies large ones, and with ``gated`` takes large MLPs with a gate.
    """

    mesh: Mesh
    rules: Rules
    sizes: Mapping[str, int]
    reduce: torch.dtype = torch.float32
    regather: bool = True
    parts: bool = False
    late: bool = False
    engine: bool = False
    piecewise: bool = False
    fp8: Literal["tensor", "rows"] | None = None
    quack: int = 0
    gated: bool = False
    _layouts: dict[tuple[str, str], Layout] = field(default_factory=dict[tuple[str, str], Layout], repr=False)

    def layout(self, letters: str, table: str = "act") -> Layout:
        """Give the layout that a table (store, compute or act) gives to an array spelled in letters."""
        if (letters, table) not in self._layouts:
            names = legend.names(letters)
            shape = [self.sizes.get(name, 1) if name != "whole" else 1 for name in names]
            what = "parameter" if table != "act" else "activation"
            self._layouts[letters, table] = self.rules.layout(table, names, shape, self.mesh.shape, f"{what} {letters!r}")
        return self._layouts[letters, table]

    def keeping(self) -> "Parallel":
        """Give the same, but keeping gathered weights."""
        return replace(self, regather=False)

    def sized(self, **sizes: int) -> "Parallel":
        """Give the same for other sizes of some logical axes."""
        return replace(self, sizes={**self.sizes, **sizes}, _layouts={})

    def axes(self, letter: str, table: str = "act") -> Axes:
        """Give the mesh axes that split one logical axis."""
        return self.layout(letter, table).dims[0]

    def reshard(self, x: Tensor, src: str, dst: str, partial: Axes = ()) -> Tensor:
        """Bring an activation from one spelled layout to another; ``partial`` names sums still outstanding in ``x``."""
        return verbs.reshard(x, Layout(self.layout(src).dims, partial), self.layout(dst), self.mesh)

    def span(self, letter: str, table: str = "act") -> tuple[int, int]:
        """Give (start, length) of this device's part of a logical axis, ceil-sized where it is padded."""
        axes = self.axes(letter, table)
        chunk = -(-self.sizes[legend.LETTERS[letter]] // self.mesh.size(axes))
        return chunk * self.mesh.index(axes), chunk

    def copies(self, letters: str) -> int:
        """Count the devices that hold the same part of an activation: what a loss computed on it must be divided by."""
        return self.mesh.shape.devices() // self.mesh.size(self.layout(letters).used())
