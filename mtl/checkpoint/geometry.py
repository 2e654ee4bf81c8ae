"""Who holds and who writes which part of an array: arithmetic on (shape, mesh, placements), the same on every process without talking.

An array's file grid follows from how a mesh splits it: one writer's box a file, cut further until a file is at most `FILE_BYTES`. Inside a
file lie tiles of about `TILE_BYTES`: what is read and checked at once. A file has exactly one writer.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from mtl.errors import UserError

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) of a part of an array."""

FILE_BYTES = 16 << 20
"""About what a file holds: enough files for every thread, and what is copied for them stays in memory that was used a moment ago."""
SHARE_BYTES = 1 << 20
"""Copies of a box smaller than this are written by one holder; larger ones are shared out among the holders."""
TILE_BYTES = 1 << 20
ROW_FILE_BYTES, ROW_TILE_BYTES = 32 << 20, 4 << 20
"""What files and tiles hold where tiles are whole rows: in memory larger ones take less of the processor's time, and no disk waits."""
ROW_BYTES = 1 << 10
"""Rows of a tile are not cut shorter than half of this while another dimension can be cut."""


@dataclass(frozen=True)
class Split:
    """How a mesh splits an array: for each dimension the mesh dimensions that cut it, the outermost cut first."""

    shape: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    mesh: tuple[int, ...]
    ranks: tuple[int, ...]

    def parts(self) -> tuple[int, ...]:
        """Count the parts of every dimension."""
        return tuple(math.prod(self.mesh[i] for i in cut) for cut in self.cuts)

    def unit(self) -> tuple[int, ...]:
        """Give the shape of a whole part."""
        return tuple(-(-n // p) for n, p in zip(self.shape, self.parts(), strict=True))

    def regular(self) -> bool:
        """Tell whether all parts lie on one grid: a dimension that is cut more than once must divide."""
        return all(len(cut) < 2 or n % p == 0 for n, p, cut in zip(self.shape, self.parts(), self.cuts, strict=True))

    def box(self, place: Sequence[int]) -> Box:
        """Give the part of the process at these mesh coordinates: cut after cut, in ceil-sized pieces."""
        offset, local = [0] * len(self.shape), list(self.shape)
        for d, cut in enumerate(self.cuts):
            for i in cut:
                piece = -(-local[d] // self.mesh[i])
                start = min(piece * place[i], local[d])
                offset[d], local[d] = offset[d] + start, min(piece, local[d] - start)
        return tuple(offset), tuple(local)

    def holders(self) -> dict[Box, list[int]]:
        """List for every part that is not empty the ranks that hold it."""
        found: dict[Box, list[int]] = {}
        for rank, place in zip(self.ranks, itertools.product(*(range(n) for n in self.mesh)), strict=True):
            box = self.box(place)
            if 0 not in box[1]:
                found.setdefault(box, []).append(rank)
        return found


def split_of(name: str, x: Tensor, world: int) -> Split:
    """Say how a leaf is split; a tensor that is no DTensor is held whole by every process."""
    if not isinstance(x, DTensor):
        return Split(tuple(x.shape), ((),) * x.dim(), (world,), tuple(range(world)))
    mesh = x.device_mesh
    ranks = tuple(int(r) for r in mesh.mesh.flatten().tolist())
    return Split(tuple(x.shape), _cuts(name, x), tuple(mesh.mesh.shape), ranks)


def _cuts(name: str, x: DTensor) -> tuple[tuple[int, ...], ...]:
    cuts: list[list[int]] = [[] for _ in x.shape]
    sizes = x.device_mesh.mesh.shape
    for i, placement in reversed(list(enumerate(x.placements))):
        p: Any = placement
        if p.is_partial():
            raise UserError(f"checkpoint leaf {name!r} is placed {x.placements}: a sum is outstanding. Reduce it before saving.")
        if isinstance(p, Replicate):
            continue
        strided = getattr(p, "split_factor", None)
        if strided is None and not isinstance(p, Shard):
            raise UserError(f"checkpoint leaf {name!r} is placed {x.placements}: expected Shard and Replicate alone.")
        cut = cuts[p.dim]
        at = next((k for k in range(len(cut) + 1) if math.prod(sizes[j] for j in cut[:k]) == (strided or 1)), None)
        if at is None or (strided and x.shape[p.dim] % math.prod(sizes)):
            raise UserError(
                f"checkpoint leaf {name!r} of shape {tuple(x.shape)} is placed {x.placements} on a mesh of {tuple(sizes)}: its parts "
                "are not contiguous boxes. Pad that dimension to a multiple of the devices that split it."
            )
        cut.insert(at if strided else 0, i)
    return tuple(tuple(cut) for cut in cuts)


def file_shape(split: Split, itemsize: int, limit: int) -> tuple[int, ...]:
    """Choose what one file holds: a part, or an even share of it where several hold it or it is larger than about ``limit`` bytes."""
    parts, chunk = split.parts(), list(split.unit())
    copies = math.prod(split.mesh) // math.prod(parts)
    share = max(math.prod(chunk) * itemsize / copies, SHARE_BYTES)
    goal = share / math.ceil(share / (1.1 * limit))
    for most in (4, max(chunk, default=1)):  # few uneven cuts first: a prime length may be left whole where another dimension can be cut
        for d, n in enumerate(chunk):
            size = math.prod(chunk) * itemsize
            if size <= (1.01 if most == 4 else 4) * goal:
                break
            least = min(math.ceil(0.999 * size / goal), n)
            even = next((k for k in range(least, min(most * least, n) + 1) if n % k == 0), None)
            if parts[d] == 1:
                chunk[d] = -(-n // (even if even and 2 * even <= 3 * least and even % copies == 0 else least))
            elif even:
                chunk[d] = n // even
    if math.prod(chunk) * itemsize > TILE_BYTES:  # a dimension in one piece may have room at its end, so that tiles divide it
        chunk = [-(-n // 64) * 64 if parts[d] == 1 and n > 256 else n for d, n in enumerate(chunk)]
    return tuple(chunk)


def tile_shape(chunk: Sequence[int], itemsize: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Choose tiles of about `TILE_BYTES` that divide a file: single layers first, then every other dimension cut about as often.

    Cuts into files count up to four, so that an array whose files are rows has tiles for those who read columns.
    """
    tile, cuts = list(chunk), [min(4, -(-n // c)) for n, c in zip(shape, chunk, strict=True)]
    while math.prod(tile) * itemsize > TILE_BYTES:
        free = [d for d, n in enumerate(tile) if n > 1]
        wide = [d for d in free if d < len(tile) - 1 or tile[d] * itemsize > ROW_BYTES] or free
        d = 0 if len(tile) > 2 and 0 in wide else min(wide, key=lambda d: (cuts[d], -tile[d]))
        factor = next(k for k in itertools.count(2) if tile[d] % k == 0 or k * k > tile[d])
        factor = factor if tile[d] % factor == 0 else tile[d]
        if len(wide) > 1 and factor > 64 and len(tile) <= 2:  # a prime length: leave it whole where another dimension can be cut
            d = next(e for e in wide if e != d)
            factor = next(k for k in range(2, tile[d] + 1) if tile[d] % k == 0)
        tile[d] //= factor
        cuts[d] *= factor
    return tuple(tile)


def row_tile_shape(chunk: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Choose tiles of about `ROW_TILE_BYTES` that divide a file and are whole rows of it: in memory a tile's values lie side by side.

    A file of more than `TILE_BYTES` has two at least.
    """
    tile, size = list(chunk), math.prod(chunk) * itemsize
    goal = min(ROW_TILE_BYTES, max(TILE_BYTES, size // 2))
    for d, n in enumerate(chunk):
        cuts = math.ceil(math.prod(tile) * itemsize / goal)
        if cuts > 1:
            tile[d] //= next(k for k in range(min(cuts, n), n + 1) if n % k == 0)
    return tuple(tile)


def places(grid: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """List the places of a grid."""
    return itertools.product(*grid)


def cells(box: Box, chunk: Sequence[int]) -> Iterator[Box]:
    """Cut a part into the boxes of its files."""
    offset, shape = box
    starts = [range(o, o + n, c) for o, n, c in zip(offset, shape, chunk, strict=True)]
    for corner in itertools.product(*starts):
        yield corner, tuple(min(c, o + n - s) for s, o, n, c in zip(corner, offset, shape, chunk, strict=True))


def whole(box: Box, shape: Sequence[int], chunk: Sequence[int]) -> bool:
    """Tell whether a part is made of whole files."""
    return all(o % c == 0 and ((o + n) % c == 0 or o + n == full) for o, n, full, c in zip(*box, shape, chunk, strict=True))


def writers(splits: Sequence[tuple[Split, tuple[int, ...], int]], world: int) -> list[dict[int, list[Box]]]:
    """Give every file of every array (split, file shape, itemsize) to one of the ranks that hold it, the least burdened so far."""
    burden = [0] * world
    found: list[dict[int, list[Box]]] = []
    for split, chunk, itemsize in splits:
        mine: dict[int, list[Box]] = {}
        for box, ranks in split.holders().items():
            for cell in cells(box, chunk):
                rank = min(ranks, key=lambda r: burden[r])
                burden[rank] += math.prod(cell[1]) * itemsize
                mine.setdefault(rank, []).append(cell)
        found.append(mine)
    return found
