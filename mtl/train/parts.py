"""Parts of a state, updated one after the other: in each a share of a layer of every stacked array, and a share of every other array.

A compiled gradient comes layer by layer. To update whole stacks it would have to be copied into stacks of its own first: 8 bytes a
parameter to and from memory, and a second copy of all gradients at the end of backward.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtl import tree

ALIGNED = 64
"""Elements: what every share's start divides by."""


@dataclass(frozen=True)
class Parts:
    """How a state is taken apart: by layers, or not where that is 0, and each layer (or all) into so many shares."""

    layers: int
    each: int = 1

    @property
    def count(self) -> int:
        """Count the parts."""
        return max(1, self.layers) * self.each

    def take(self, x: Any, stacked: bool, c: int) -> Tensor:
        """Give part c of an array, a view, or of the list of a stacked array's layers."""
        shares = self.count
        if stacked and self.layers:
            layer, c = divmod(c, self.each)
            x, shares = x[layer], self.each
            x = x if x.dim() else x.view(1)
        if shares == 1:
            return x
        x = x if self.each == 1 else x.view(-1)  # else rows are enough, and may have gaps between them
        return x.narrow(0, *bounds(len(x), c, shares, 1 if x[:1].numel() % ALIGNED == 0 else ALIGNED))


def bounds(size: int, c: int, count: int, unit: int = ALIGNED) -> tuple[int, int]:
    """Give (start, length) of share c of an array: all are equal but the last, which takes the rest, so few shapes are compiled.

    Shares start where the vectors of a kernel over the whole array would, so that each number is computed alike.
    """
    each = size // count // unit * unit
    return c * each, size - c * each if c == count - 1 else each


def stacked(values: tree.Tree, layers: int) -> list[bool]:
    """Tell of each leaf whether it is an array of all layers: parameters, or what an optimizer holds beside each."""
    return ["layers" in path.split(".") and x.dim() > 0 and len(x) == layers for path, x in tree.paths(values)]


def count_layers(params: tree.Tree) -> int:
    """Count the layers of stacked parameters; 0 where there are none."""
    layers = tree.leaves(params.get("layers"))
    return len(layers[0]) if layers else 0
