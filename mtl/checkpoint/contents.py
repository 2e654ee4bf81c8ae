"""What a checkpoint holds: its arrays, its host state, its configuration and what was saved beside, without reading any array."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl import tree
from mtl.checkpoint import arrays, orbax
from mtl.checkpoint.files import AROUND, MANIFEST, check_file, unseal
from mtl.checkpoint.peers import CheckpointError, Damaged


@dataclass(frozen=True)
class ArrayInfo:
    """One array. ``file`` is the shape of what one file holds, ``tile`` of what is read and checked at once."""

    name: str
    keys: orbax.Keys
    shape: tuple[int, ...]
    dtype: str
    file: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Give its size."""
        return math.prod(self.shape) * arrays.DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Contents:
    """A checkpoint without its arrays' values. ``files`` lists what was saved beside, by name; Orbax's own have none of it."""

    path: Path
    arrays: Mapping[str, ArrayInfo]
    driver: str
    ocdbt: bool
    by_mtl: bool
    host: Any = None
    config: Any = None
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    item: Path = Path()

    def read(self, name: str) -> bytes:
        """Give a file that was saved beside the arrays, checked."""
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no file {name!r}. It has: {', '.join(sorted(self.files)) or 'none'}.")
        return check_file(self.item, name, unseal(self.item / MANIFEST)["files"][name])


def inspect(path: str | Path) -> Contents:
    """List what a checkpoint holds, and check every file of it but the arrays' values."""
    path = Path(path).absolute()
    found = orbax.listing(path)
    if not (found.folder / MANIFEST).exists():
        if _ours(found.folder):
            raise Damaged(f"{found.folder / MANIFEST} is missing, but the checkpoint was written by mtl. Restore another checkpoint.")
        return Contents(path, _foreign(found), found.driver, found.ocdbt, by_mtl=False, item=found.folder)
    manifest = unseal(found.folder / MANIFEST)
    here = {name: want for name, want in manifest["files"].items() if path != found.folder or not name.startswith(AROUND)}
    read = {name: check_file(found.folder, name, want) for name, want in here.items()}
    known = {
        name: ArrayInfo(name, tuple(a["keys"]), tuple(a["shape"]), a["dtype"], tuple(a["file"]), tuple(a["tile"]))
        for name, a in manifest["arrays"].items()
    }
    hidden = ("_METADATA", "_host.json", "_config.json")
    beside = {name: found.folder / name for name in read if name.startswith("_") and name not in hidden}
    host, config = (json.loads(read[name]) for name in ("_host.json", "_config.json"))
    return Contents(path, known, "zarr3", False, True, host, config, beside, found.folder)


def structure(contents: Contents, leaf: Callable[[ArrayInfo], Any] = lambda info: info) -> tree.Tree:
    """Give the arrays as nested dicts and lists, as their keys say; ``leaf`` makes the leaves of their `ArrayInfo`."""
    root: dict[Any, Any] = {}
    for info in contents.arrays.values():
        node = root
        for key in info.keys[:-1]:
            node = node.setdefault(key, {})
        node[info.keys[-1]] = leaf(info)
    return _lists(root)


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inner = {k: _lists(v) for k, v in node.items()}
    if inner and all(isinstance(k, int) for k in inner):
        return [inner.get(i) for i in range(max(inner) + 1)]
    return inner


def _ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("_host.json", "_config.json"))


def _foreign(found: orbax.Listing) -> dict[str, ArrayInfo]:
    ctx = arrays.context()
    opening = {name: arrays.open_old(found.folder, name, ctx, found.driver, found.ocdbt) for name in found.arrays}
    known: dict[str, ArrayInfo] = {}
    for name, keys in found.arrays.items():
        try:
            array = opening[name].result()
        except (ValueError, OSError) as error:
            raise Damaged(f"{found.folder}: array {name!r} cannot be opened: {error}") from None
        if array.dtype.name not in arrays.DTYPES:
            raise CheckpointError(f"{found.folder}: array {name!r} has type {array.dtype.name}, which torch does not know.")
        write, read = (tuple(layout.shape or ()) for layout in (array.chunk_layout.write_chunk, array.chunk_layout.read_chunk))
        known[name] = ArrayInfo(name, keys, tuple(array.shape), array.dtype.name, write, read)
    return known
