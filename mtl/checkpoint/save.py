"""Save a tree of tensors as global arrays: every process writes what it holds, each file once, and rank 0 commits them together."""

import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from mtl import __version__, tree
from mtl.checkpoint import arrays, files, geometry, orbax
from mtl.checkpoint.files import ITEM, MANIFEST, VERSION
from mtl.checkpoint.geometry import Box, Split
from mtl.checkpoint.peers import CheckpointError, Peers, peers
from mtl.errors import UserError

Piece = tuple["PlannedLeaf", Box, Tensor]
"""A leaf, a box of it that this process writes, and its values."""

Part = Callable[[str, Box], Tensor]
"""``part(name, (offset, shape))`` gives that box of a leaf, on any device."""

FilesOf = Callable[[str, tuple[int, ...]], tuple[int, ...] | None]

THREADS = min(8, os.cpu_count() or 1)
ALONE = min(16, os.cpu_count() or 1)
"""The threads of a process that saves alone: to memory, checksums are what takes time."""
IN_FLIGHT = 3 * geometry.FILE_BYTES
"""Bytes a thread that are handed to tensorstore and not written yet, which is also about what it copies."""
LEAST_IN_FLIGHT = 8 * geometry.FILE_BYTES
"""The same where there are few threads: who waits for the oldest file must find others under way."""
UNFLUSHED = 64
"""How many files a process may have written whose values are not on the disk yet."""
STREAMED = 128 << 20
"""The same, over all threads, where values come box by box because they do not fit in memory."""


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


@dataclass(frozen=True)
class Plan:
    """What a save writes."""

    leaves: tuple[PlannedLeaf, ...]
    empty: tuple[tuple[orbax.Keys, Any], ...]


def save(
    path: str | Path,
    state: tree.Tree,
    *,
    host: Any = None,
    config: Any = None,
    extra: Mapping[str, Any] | None = None,
    part: Part | None = None,
    files_of: FilesOf | None = None,
) -> None:
    """Save a tree of tensors as one committed checkpoint; every process calls this alike.

    Leaves are DTensors on any mesh, or plain tensors that every process holds alike. ``host`` (data cursor, seeds, run id) and ``config``
    are JSON. ``extra`` maps names with a leading ``_``, such as ``_model/tokenizer.json``, to JSON, to bytes or to a `Path` that is copied;
    all of it is committed with the arrays. Nothing is ever overwritten.

    With ``part``, leaves may be meta tensors: ``part(name, (offset, shape))`` is called for one box after the other and gives its values,
    so that a tree larger than memory can be written. In several processes each is asked for its share alone. ``files_of(name, shape)`` may
    choose what one file of an array holds, for arrays that are no DTensors.
    """
    path, group = Path(path).absolute(), peers()
    plan = make_plan(state, group, files_of)
    small = small_files(host, config, extra)
    state = regular(state)
    give, in_flight = (part_of(state), None) if part is None else (part, STREAMED)
    boxes = ((leaf, box, give(leaf.name, box)) for leaf in _largest_first(plan) for box in leaf.mine)
    write_checkpoint(path, plan, small, group, [boxes], ALONE if group.world == 1 else THREADS, in_flight)


def make_plan(state: tree.Tree, group: Peers, files_of: FilesOf | None = None) -> Plan:
    """Decide which process writes which box of which leaf: the same plan on every process."""
    entries = tree.keyed(state, empty=True)
    empty = [(keys, x) for keys, x in entries if x is None or (isinstance(x, dict | list | tuple) and not x)]
    leaves: list[tuple[str, orbax.Keys, Any]] = [
        (".".join(str(k) for k in keys), keys, x) for keys, x in entries if x is not None and not isinstance(x, dict | list | tuple)
    ]
    check_names([(name, keys) for name, keys, _ in leaves])
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
        splits.append((split, chosen or geometry.file_shape(split, x.dtype.itemsize), x.dtype.itemsize))
    shares = geometry.writers(splits, group.world)
    planned = tuple(
        PlannedLeaf(
            name,
            keys,
            split,
            arrays.dtype_name(x.dtype, name),
            chunk,
            geometry.tile_shape(chunk, size, x.shape),
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


def part_of(state: tree.Tree) -> Part:
    """Read boxes from this process's part of every leaf."""
    held: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for name, x in tree.paths(state):
        if isinstance(x, DTensor):
            place: Any = x.device_mesh.get_coordinate()
            if place is not None:
                held[name] = (geometry.split_of(name, x, 1).box(place)[0], x.to_local().detach())
        elif isinstance(x, Tensor):
            held[name] = ((0,) * x.dim(), x.detach())

    def part(name: str, box: Box) -> Tensor:
        offset, local = held[name]
        return local[tuple(slice(o - start, o - start + n) for o, n, start in zip(*box, offset, strict=True))]

    return part


def small_files(host: Any, config: Any, extra: Mapping[str, Any] | None) -> dict[str, bytes | Path]:
    """Spell what is saved beside the arrays, or say why it cannot be."""
    found: dict[str, bytes | Path] = {
        "_host.json": files.as_json(host, "host state"),
        "_config.json": files.as_json(config, "the configuration"),
    }
    for name, value in (extra or {}).items():
        if not name.startswith("_") or ".." in name.split("/") or name in (*found, MANIFEST, "_METADATA", "_sharding", "_strings.json"):
            raise UserError(
                f"extra file {name!r}: its name must begin with '_', lie inside the checkpoint and not be one that it uses itself."
            )
        if isinstance(value, Path) and not value.is_file():
            raise UserError(f"extra file {name!r}: {value} is no file.")
        found[name] = value if isinstance(value, bytes | Path) else files.as_json(value, f"extra file {name!r}")
    return found


def write_checkpoint(
    path: Path,
    plan: Plan,
    small: Mapping[str, bytes | Path],
    group: Peers,
    waves: Iterable[Iterable[Piece]],
    threads: int = THREADS,
    in_flight: int | None = None,
) -> None:
    """Write beside the place, flush, and commit: visible whole on every process's return, or not at all.

    The pieces of a wave are on the disk before the next wave is asked for.
    """
    begun, ctx = time.time(), arrays.context(threads)
    folder = files.unfinished(path).resolve() / ITEM
    unlock: list[Callable[[], None]] = []
    decided: list[bool] = []
    listed: list[Future[tuple[dict[str, bytes], dict[str, Any]]]] = []

    def begin() -> None:
        unlock.append(_begin(path))
        decided.append(arrays.squeezes(folder))

    def write() -> None:
        created: dict[str, Future[Any]] = {}
        if group.rank == 0:
            for leaf in _largest_first(plan):
                created[leaf.name] = beside.submit(arrays.create, folder, leaf.name, leaf.meta(squeezed), ctx)
            listed.append(beside.submit(_listed, folder, plan, small, created))

        def array(leaf: PlannedLeaf) -> Any:
            here = created.get(leaf.name)
            return _written(here.result() if here else arrays.open_new(folder, leaf.name, leaf.meta(squeezed), ctx))

        try:
            for pieces in waves:
                _write_pieces(folder, pieces, array, in_flight or max(threads * IN_FLIGHT, LEAST_IN_FLIGHT))
        finally:
            for made in created.values():
                _written(made.result())

    try:
        group.together(f"begin {path}", begin if group.rank == 0 else lambda: None)
        squeezed = group.agree(f"squeeze {path}", None, decided)[0] == [True]
        with ThreadPoolExecutor(1, thread_name_prefix="arrays") as beside:  # makes the arrays, then what lists them
            group.together(f"write {path}", write)
        group.together(f"commit {path}", lambda: _commit(path, plan, *listed[0].result(), begun) if group.rank == 0 else None)
    except BaseException:
        if group.rank == 0 and unlock:
            shutil.rmtree(files.unfinished(path), ignore_errors=True)
        raise
    finally:
        for release in unlock:
            release()


def _largest_first(plan: Plan) -> list[PlannedLeaf]:
    """Order the arrays so that all threads soon have work, and still do while the small ones are made."""
    return sorted(plan.leaves, key=lambda leaf: math.prod(leaf.split.shape), reverse=True)


def _begin(path: Path) -> Callable[[], None]:
    try:
        files.refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unlock = files.take_lock(path.with_name(f".{path.name}.lock"), str(path))
        try:
            partial = files.unfinished(path)
            if partial.exists():  # left behind: its writer would hold the lock
                shutil.rmtree(partial)
            (partial / ITEM).mkdir(parents=True)
        except BaseException:
            unlock()
            raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror} ({error.filename}). Nothing was changed.") from None
    return unlock


def _write_pieces(folder: Path, pieces: Iterable[Piece], array: Callable[[PlannedLeaf], Any], in_flight: int) -> None:
    """Write some pieces into what ``array`` gives for a leaf, all on the disk on return.

    Threads beside write each file out as soon as it is there: a disk is fastest with much to do, and what is computed for a file
    (checksums, tiles) does not wait for another file. All are flushed together at the end. In memory there is nothing to flush.
    """
    opened: dict[str, Any] = {}
    on_disk = not files.in_memory(folder)
    flying: deque[tuple[Any, int]] = deque()
    leaving: deque[Future[None]] = deque()
    written: list[Path] = []
    bytes_flying = 0
    with ThreadPoolExecutor(files.FLUSHES, thread_name_prefix="flush") as pool:
        try:
            for leaf, (offset, shape), values in pieces:
                if tuple(values.shape) != shape or str(values.dtype) != f"torch.{leaf.dtype}":
                    raise UserError(
                        f"checkpoint leaf {leaf.name!r}: the part at {offset} is {values.dtype} {tuple(values.shape)}, "
                        f"expected {leaf.dtype} {shape}."
                    )
                if leaf.name not in opened:
                    opened = {leaf.name: array(leaf)}
                x = arrays.as_numpy(values.cpu())
                while flying and bytes_flying + x.nbytes > in_flight:
                    done, size = flying.popleft()
                    _written(done)
                    bytes_flying -= size
                while len(leaving) > UNFLUSHED:
                    leaving.popleft().result()
                flying.append((arrays.write(opened[leaf.name], offset, x), x.nbytes))
                bytes_flying += x.nbytes
                if on_disk:
                    written.append(folder / leaf.file_at(offset))
                    leaving.append(pool.submit(_write_out, flying[-1][0], written[-1]))
        finally:
            for done, _ in flying:
                done.exception()  # whatever failed: nothing is written into a folder that is removed
        for done, _ in flying:
            _written(done)
        for left in leaving:
            left.result()
    if on_disk:
        files.flush_all(files.with_folders(written, folder))


def _written(future: Any) -> Any:
    try:
        return future.result()
    except ValueError as error:
        raise CheckpointError(f"{arrays.reason(error)}. Nothing of this checkpoint was kept.") from None


def _write_out(write: Any, path: Path) -> None:
    _written(write)
    files.write_out(path)


def _listed(
    folder: Path, plan: Plan, small: Mapping[str, bytes | Path], created: Mapping[str, Future[Any]]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Flush the arrays' zarr.json once they are made, spell the files beside the arrays, and list all contents."""
    for array in created.values():
        _written(array.result())
    if not files.in_memory(folder):
        files.flush_all(files.with_folders((folder / leaf.name / "zarr.json" for leaf in plan.leaves), folder))
    found = {name: value.read_bytes() if isinstance(value, Path) else value for name, value in small.items()}
    found["_METADATA"] = orbax.tree_metadata([leaf.keys for leaf in plan.leaves], plan.empty)
    shapes = {f"{leaf.name}/zarr.json": (folder / leaf.name / "zarr.json").read_bytes() for leaf in plan.leaves}
    manifest = {
        "format_version": VERSION,
        "written_by": {"mtl": __version__, "torch": torch.__version__},
        "arrays": {leaf.name: _describe(leaf) for leaf in plan.leaves},
        "files": {name: files.stamp(data) for name, data in (shapes | found).items()},
    }
    return found, manifest


def _commit(path: Path, plan: Plan, beside: dict[str, bytes], manifest: dict[str, Any], begun: float) -> None:
    partial = files.unfinished(path)
    folder = partial / ITEM
    for leaf in plan.leaves:
        lost = next((f for f in _file_names(leaf) if not files.is_there(f"{folder}/{f}")), None)
        if lost is not None:
            raise UserError(f"{folder / lost} was written but is not there: another program removed it. Nothing was committed.")
    around = {
        f"{files.AROUND}_CHECKPOINT_METADATA": orbax.step_metadata(begun),
        f"{files.AROUND}commit_success.txt": b"Checkpoint commit was successful.\n",
    }
    listed = manifest["files"] | {name: files.stamp(data) for name, data in around.items()}
    small = beside | around | {MANIFEST: files.seal(manifest | {"files": listed})}
    written = [files.write_file((folder / name).resolve(), data) for name, data in small.items()]
    if not files.in_memory(folder):
        files.flush_all(files.with_folders(written, partial.resolve()))
    files.publish(path)


def _describe(leaf: PlannedLeaf) -> dict[str, Any]:
    return {
        "keys": list(leaf.keys),
        "shape": list(leaf.split.shape),
        "dtype": leaf.dtype,
        "file": list(leaf.chunk),
        "tile": list(leaf.tile),
    }


def _file_names(leaf: PlannedLeaf) -> Iterable[str]:
    yield f"{leaf.name}/zarr.json"
    grid = [range(math.ceil(n / c)) for n, c in zip(leaf.split.shape, leaf.chunk, strict=True)]
    for place in geometry.places(grid):
        yield "/".join([leaf.name, "c", *(str(i) for i in place)])


def _outermost(split: Split) -> Split:
    if split.regular():
        return split
    parts = split.parts()
    kept = [cut[:1] if len(cut) > 1 and n % p else cut for n, p, cut in zip(split.shape, parts, split.cuts, strict=True)]
    return Split(split.shape, tuple(kept), split.mesh, split.ranks)
