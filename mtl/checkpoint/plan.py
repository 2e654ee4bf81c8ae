"""Plan a save: which process writes which box of which array, and into what files; the same on every process without talking."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from mtl import tree
from mtl.checkpoint import arrays, geometry, orbax
from mtl.checkpoint.geometry import Box, Split
from mtl.checkpoint.peers import Peers
from mtl.errors import UserError

FilesOf = Callable[[str, tuple[int, ...]], tuple[int, ...] | None]


@dataclass(frozen=True)
class PlannedLeaf:
    """One array: what is common to all processes, and the boxes that this one writes."""

    name: str
    keys: orbax.Keys
    split: Split
    dtype: str
    chunk: tuple[int, ...]
    tile: tuple[int, ...]
    mine: tuple[Box, ...]

    def meta(self, squeezed: bool) -> dict[str, Any]:
        """Give its zarr.json."""
        return arrays.metadata(self.split.shape, self.dtype, self.chunk, self.tile, squeezed)

    def file_at(self, offset: Sequence[int]) -> str:
        """Name the file that a box at ``offset`` goes into."""
        return "/".join([self.name, "c", *(str(o // n) for o, n in zip(offset, self.chunk, strict=True))])

    def files(self) -> Iterable[str]:
        """Name all files of the array."""
        yield f"{self.name}/zarr.json"
        grid = [range(math.ceil(n / c)) for n, c in zip(self.split.shape, self.chunk, strict=True)]
        for place in geometry.places(grid):
            yield "/".join([self.name, "c", *(str(i) for i in place)])

    def describe(self) -> dict[str, Any]:
        """Give what the list of contents says of the array."""
        return {
            "keys": list(self.keys),
            "shape": list(self.split.shape),
            "dtype": self.dtype,
            "file": list(self.chunk),
            "tile": list(self.tile),
        }


@dataclass(frozen=True)
class Plan:
    """What a save writes."""

    leaves: tuple[PlannedLeaf, ...]
    empty: tuple[tuple[orbax.Keys, Any], ...]

    def largest_first(self) -> list[PlannedLeaf]:
        """Order the arrays so that all threads soon have work, and still do while the small ones are made."""
        return sorted(self.leaves, key=lambda leaf: math.prod(leaf.split.shape), reverse=True)


def make_plan(state: tree.Tree, group: Peers, files_of: FilesOf | None = None, rows: bool = False) -> Plan:
    """Decide which process writes which box of which leaf: the same plan on every process. Tiles may be whole ``rows``."""
    entries = tree.keyed(state, empty=True)
    empty = [(keys, x) for keys, x in entries if x is None or (isinstance(x, dict | list | tuple) and not x)]
    leaves: list[tuple[str, orbax.Keys, Any]] = [
        (".".join(str(k) for k in keys), keys, x) for keys, x in entries if x is not None and not isinstance(x, dict | list | tuple)
    ]
    check_names([(name, keys) for name, keys, _ in leaves])
    limit = geometry.ROW_FILE_BYTES if rows else geometry.FILE_BYTES
    splits: list[tuple[Split, tuple[int, ...], int]] = []
    for name, _, x in leaves:
        if not isinstance(x, Tensor):
            raise UserError(
                f"checkpoint leaf {name!r} is a {type(x).__name__}: expected a tensor. Numbers and text go into host= or config=."
            )
        arrays.dtype_name(x.dtype, f"checkpoint leaf {name!r}")
        if x.numel() == 0:
            raise UserError(f"checkpoint leaf {name!r} of shape {tuple(x.shape)} has no elements, which Orbax cannot hold. Leave it out.")
        split = _outermost(geometry.split_of(name, x, group.world))
        chosen = files_of(name, tuple(x.shape)) if files_of is not None and not isinstance(x, DTensor) else None
        splits.append((split, chosen or geometry.file_shape(split, x.dtype.itemsize, limit), x.dtype.itemsize))
    shares = geometry.writers(splits, group.world)
    planned = tuple(
        PlannedLeaf(
            name,
            keys,
            split,
            arrays.dtype_name(x.dtype, name),
            chunk,
            geometry.row_tile_shape(chunk, size) if rows else geometry.tile_shape(chunk, size, x.shape),
            tuple(share.get(group.rank, ())),
        )
        for (name, keys, x), (split, chunk, size), share in zip(leaves, splits, shares, strict=True)
    )
    return Plan(planned, tuple(empty))


def check_names(names: Iterable[tuple[str, orbax.Keys]]) -> None:
    """Refuse names that would meet in one file or hide ours: joined by dots they must differ."""
    known: dict[str, orbax.Keys] = {}
    for name, keys in names:
        if name in known:
            raise UserError(f"checkpoint leaves {known[name]} and {keys} are both called {name!r}: rename one of them.")
        if not name or name.startswith(("_", ".")) or "/" in name or name.endswith(".") or ".." in name or len(name.encode()) > 240:
            raise UserError(
                f"checkpoint leaf {name!r} cannot be a folder's name: it must be 1 to 240 bytes long, have no '/', no empty part and not "
                "begin with '_', which is kept for other files."
            )
        known[name] = keys


def regular(state: tree.Tree) -> tree.Tree:
    """Give leaves whose parts lie on no grid (one dimension cut unevenly by several mesh dimensions) the outermost cut alone."""

    def mend(path: str, x: Any) -> Any:
        if not isinstance(x, DTensor) or geometry.split_of(path, x, 1).regular():
            return x
        kept = _outermost(geometry.split_of(path, x, 1))
        by_axis = {cut[0]: d for d, cut in enumerate(kept.cuts) if cut and len(cut) == 1}
        by_axis |= {i: d for d, cut in enumerate(kept.cuts) for i in cut}
        return x.redistribute(placements=[Shard(by_axis[i]) if i in by_axis else Replicate() for i in range(x.device_mesh.ndim)])

    return tree.map_paths(mend, state)


def _outermost(split: Split) -> Split:
    if split.regular():
        return split
    parts = split.parts()
    kept = [cut[:1] if len(cut) > 1 and n % p else cut for n, p, cut in zip(split.shape, parts, split.cuts, strict=True)]
    return Split(split.shape, tuple(kept), split.mesh, split.ranks)
