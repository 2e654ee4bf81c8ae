"""Name maps: where each of our arrays lies in another library's tensors, as data, and the pure functions that go both ways.

Ours is one layer's array, spelled in the letters of its ParamSpec without the L. Theirs has the same axes in another order, with a head
axis (H or G) and the K after it as one dimension. A fused tensor holds several of ours: each knows the places of its own heads.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]
"""(start, length) along one axis."""


@dataclass(frozen=True)
class Heads:
    """The places of our heads among ``total`` heads of a fused tensor: groups of ``group`` lie ``stride`` apart, the first at ``start``."""

    start: int = 0
    group: int = 1
    stride: int = 1
    total: int | None = None

    def runs(self, first: int, count: int) -> list[Span]:
        """Give the runs of neighbouring places that hold heads from ``first`` on."""
        found: list[Span] = []
        for head in range(first, first + count):
            place = self.start + head // self.group * self.stride + head % self.group
            if found and sum(found[-1]) == place:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((place, 1))
        return found


@dataclass(frozen=True)
class Row:
    """One line of a name map: their tensor (``{}`` is the layer's number), the order of our axes in it, our heads' places.

    With ``turned`` our rotary pairs are neighbours (2 i with 2 i + 1, Meta's order) and theirs are halves (i with i + K / 2).
    """

    name: str
    order: str
    heads: Heads = Heads()
    turned: bool = False


def neighbours(x: Tensor, dim: int) -> Tensor:
    """Reorder rotary pairs from halves (i with i + K / 2) to neighbours (2 i with 2 i + 1), Meta's order."""
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def halves(x: Tensor, dim: int) -> Tensor:
    """Reorder rotary pairs from neighbours to halves: the inverse of `neighbours`."""
    return x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def their_shape(row: Row, axes: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Give the shape that their tensor must have for ours of ``axes`` and ``shape``."""
    sizes = dict(zip(axes, shape, strict=True))
    found: list[int] = []
    for group in _dims(row.order):
        if len(group) == 2:
            heads = row.heads.total or sizes[group[0]]
            found.append(heads * sizes[group[1]])
        else:
            found.append(sizes[group])
    return tuple(found)


def take(row: Row, axes: str, shape: Sequence[int], theirs: Any, box: Sequence[Span] | None = None) -> Tensor:
    """Cut our box (start, length along each axis; all by default) out of their tensor, or of a lazy slice of a file; reads no more."""
    sizes = dict(zip(axes, shape, strict=True))
    spans = dict(zip(axes, box or [(0, n) for n in shape], strict=True))
    read = {**spans, **({"K": (0, sizes["K"])} if row.turned or len(_dims(row.order)) < len(axes) else {})}
    groups = _dims(row.order)
    merged = next((i for i, group in enumerate(groups) if len(group) == 2), None)
    index = [slice(read[g][0], sum(read[g])) if len(g) == 1 else slice(None) for g in groups]
    if merged is None:
        found: Tensor = theirs[tuple(index)]
    else:
        size, parts = sizes[groups[merged][1]], list[Tensor]()
        for place, count in row.heads.runs(*read[groups[merged][0]]):
            index[merged] = slice(place * size, (place + count) * size)
            parts.append(theirs[tuple(index)])
        found = (parts[0] if len(parts) == 1 else torch.cat(parts, merged)).unflatten(merged, (-1, size))
    found = neighbours(found, row.order.index("K")) if row.turned else found
    if "K" in spans and read["K"] != spans["K"]:
        found = found.narrow(row.order.index("K"), *spans["K"])
    return found.permute([row.order.index(letter) for letter in axes])


def give(row: Row, axes: str, ours: Tensor, theirs: Tensor) -> None:
    """Write our whole array into its places of their tensor: the inverse of `take`."""
    found = ours.permute([axes.index(letter) for letter in row.order])
    found = halves(found, row.order.index("K")) if row.turned else found
    groups = _dims(row.order)
    merged = next((i for i, group in enumerate(groups) if len(group) == 2), None)
    if merged is None:
        theirs.copy_(found)
        return
    places, done = theirs.unflatten(merged, (-1, found.shape[merged + 1])), 0
    for place, count in row.heads.runs(0, found.shape[merged]):
        places.narrow(merged, place, count).copy_(found.narrow(merged, done, count))
        done += count


def _dims(order: str) -> list[str]:
    """Split an order into their dimensions: a head axis and the K after it are one."""
    return re.findall("[HG]K|.", order)
