"""Save a tree of tensors as global arrays: every process writes what it holds, each file once, and rank 0 commits them together."""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import __version__, tree
from mtl.checkpoint import arrays, files, geometry, orbax
from mtl.checkpoint.files import ITEM, MANIFEST, VERSION
from mtl.checkpoint.geometry import Box
from mtl.checkpoint.peers import CheckpointError, Peers, peers
from mtl.checkpoint.plan import FilesOf, Plan, PlannedLeaf, make_plan, regular
from mtl.errors import UserError

Piece = tuple["PlannedLeaf", Box, Tensor]
"""A leaf, a box of it that this process writes, and its values."""

Part = Callable[[str, Box], Tensor]
"""``part(name, (offset, shape))`` gives that box of a leaf, on any device."""

THREADS = min(8, os.cpu_count() or 1)
ALONE = min(16, 2 + (os.cpu_count() or 1) // 2)
"""The threads of a process that saves alone. To memory as many others write what these have checked: together they keep all cores busy."""
IN_FLIGHT = 3 * geometry.FILE_BYTES
"""Bytes a thread that are handed to tensorstore and not written yet, which is also about what it copies."""
LEAST_IN_FLIGHT = 8 * geometry.FILE_BYTES
"""The same where there are few threads: while room is made for a file, others must be under way."""
ROWS_IN_FLIGHT = 2 * geometry.ROW_FILE_BYTES
"""Bytes a thread where tiles are whole rows."""
UNFLUSHED = 64
"""How many files a process may have written whose values are not on the disk yet."""
STREAMED = 128 << 20
"""The same, over all threads, where values come box by box because they do not fit in memory."""


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

    One process that saves to memory writes whole rows, unless it gives ``part`` or ``files_of``: quicker, but who reads columns reads all.
    """
    path, group = Path(path).absolute(), peers()
    threads = ALONE if group.world == 1 else THREADS
    rows = group.world == 1 and part is None and files_of is None and files.in_memory(path)
    plan = make_plan(state, group, files_of, rows)
    small = small_files(host, config, extra)
    state = regular(state)
    give, in_flight = (part_of(state), threads * ROWS_IN_FLIGHT if rows else None) if part is None else (part, STREAMED)
    boxes = ((leaf, box, give(leaf.name, box)) for leaf in plan.largest_first() for box in leaf.mine)
    write_checkpoint(path, plan, small, group, [boxes], threads, in_flight)


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

    The pieces of a wave are on the disk before the next wave is asked for. Contents are listed beside the writes of the last wave where it
    is known which that is, and else after them: the list says when they were.
    """
    last = len(waves) - 1 if isinstance(waves, Sequence) else None
    begun, folder = time.time(), files.unfinished(path).resolve() / ITEM
    room = in_flight or max(threads * IN_FLIGHT, LEAST_IN_FLIGHT)
    unlock: list[Callable[[], None]] = []
    decided: list[bool] = []
    on_disk: list[bool] = []
    listed: list[Future[dict[str, bytes]]] = []

    def begin() -> None:
        on_disk.append(not files.in_memory(folder))
        if group.rank == 0:
            unlock.append(_begin(path))
            decided.append(arrays.squeezes(folder))

    def write() -> None:
        made = _Arrays(folder, plan, squeezed, group.rank == 0, arrays.context(threads, in_memory=not on_disk[0]))

        def list_contents() -> None:
            if group.rank == 0 and not listed:
                listed.append(beside.submit(_listed, folder, on_disk[0], plan, small, made.all(), begun))

        try:
            for i, pieces in enumerate(waves):
                _write_pieces(folder, pieces, made.array, room, on_disk[0], list_contents if i == last else lambda: None)
            list_contents()
        finally:  # whatever failed: nothing is made in a folder that is removed
            for array in made.created.values():
                array.exception()
        for array in made.created.values():
            _written(array)

    try:
        group.together(f"begin {path}", begin)
        squeezed = group.agree(f"squeeze {path}", None, decided)[0] == [True]
        with ThreadPoolExecutor(1, thread_name_prefix="contents") as beside:
            group.together(f"write {path}", write)
        group.together(f"commit {path}", lambda: _commit(path, on_disk[0], plan, listed[0].result()) if group.rank == 0 else None)
    except BaseException:
        if group.rank == 0 and unlock:
            shutil.rmtree(files.unfinished(path), ignore_errors=True)
        raise
    finally:
        for release in unlock:
            release()


class _Arrays:
    """The arrays of a checkpoint: the first process makes them, well ahead of what is written; the others know what they will be."""

    def __init__(self, folder: Path, plan: Plan, squeezed: bool, first: bool, ctx: Any) -> None:
        self.folder, self.squeezed, self.first, self.ctx = folder, squeezed, first, ctx
        self.left = iter(plan.largest_first())
        self.created: dict[str, Any] = {}

    def array(self, leaf: PlannedLeaf) -> Any:
        """Open an array to write to; with it come two more, so that writes begin with the first and hardly wait for the others."""
        if not self.first:
            return _written(arrays.open_new(self.folder, leaf.name, leaf.meta(self.squeezed), self.ctx))
        self._create([leaf, *islice(self.left, 2)])
        return _written(self.created[leaf.name])

    def all(self) -> dict[str, Any]:
        """Make those that are left; gives futures of all."""
        self._create(self.left)
        return self.created

    def _create(self, leaves: Iterable[PlannedLeaf]) -> None:
        for leaf in leaves:
            if leaf.name not in self.created:
                self.created[leaf.name] = arrays.create(self.folder, leaf.name, leaf.meta(self.squeezed), self.ctx)


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


def _write_pieces(
    folder: Path, pieces: Iterable[Piece], array: Callable[[PlannedLeaf], Any], room: int, on_disk: bool, meanwhile: Callable[[], None]
) -> None:
    """Write some pieces into what ``array`` gives for a leaf, all on the disk on return; ``meanwhile`` is called once all are under way.

    Threads beside write each file out as soon as it is there: a disk is fastest with much to do, and what is computed for a file
    (checksums, tiles) does not wait for another file. All are flushed together at the end. In memory there is nothing to flush.
    """
    opened: dict[str, Any] = {}
    ended: SimpleQueue[int] = SimpleQueue()
    under_way: dict[int, tuple[Any, int]] = {}
    leaving: deque[Future[None]] = deque()
    written: list[Path] = []
    bytes_flying = 0
    with ThreadPoolExecutor(files.FLUSHES, thread_name_prefix="flush") as pool:
        try:
            for i, (leaf, (offset, shape), values) in enumerate(pieces):
                if tuple(values.shape) != shape or str(values.dtype) != f"torch.{leaf.dtype}":
                    raise UserError(
                        f"checkpoint leaf {leaf.name!r}: the part at {offset} is {values.dtype} {tuple(values.shape)}, "
                        f"expected {leaf.dtype} {shape}."
                    )
                if leaf.name not in opened:
                    opened = {leaf.name: array(leaf)}
                x = arrays.as_numpy(values.cpu())
                while under_way and bytes_flying + x.nbytes > room:  # whichever ends next: the oldest may be the last
                    done, size = under_way.pop(ended.get())
                    bytes_flying -= size
                    _written(done)
                while len(leaving) > UNFLUSHED:
                    leaving.popleft().result()
                write = arrays.write(opened[leaf.name], offset, x)
                under_way[i] = write, x.nbytes
                write.add_done_callback(lambda _, i=i: ended.put(i))
                bytes_flying += x.nbytes
                if on_disk:
                    written.append(folder / leaf.file_at(offset))
                    leaving.append(pool.submit(_write_out, write, written[-1]))
            meanwhile()
        finally:  # whatever failed: nothing is written into a folder that is removed
            for done, _ in under_way.values():
                done.exception()
        for done, _ in under_way.values():
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
    folder: Path, on_disk: bool, plan: Plan, small: Mapping[str, bytes | Path], created: Mapping[str, Any], begun: float
) -> dict[str, bytes]:
    """Flush the arrays' zarr.json once they are made, and spell all files beside the arrays, the list of contents last."""
    for array in created.values():
        _written(array)
    if on_disk:
        files.flush_all(files.with_folders((folder / leaf.name / "zarr.json" for leaf in plan.leaves), folder))
    found = {name: value.read_bytes() if isinstance(value, Path) else value for name, value in small.items()}
    found["_METADATA"] = orbax.tree_metadata([leaf.keys for leaf in plan.leaves], plan.empty)
    found[f"{files.AROUND}_CHECKPOINT_METADATA"] = orbax.step_metadata(begun)
    found[f"{files.AROUND}commit_success.txt"] = b"Checkpoint commit was successful.\n"
    shapes = {f"{leaf.name}/zarr.json": (folder / leaf.name / "zarr.json").read_bytes() for leaf in plan.leaves}
    manifest = {
        "format_version": VERSION,
        "written_by": {"mtl": __version__, "torch": torch.__version__},
        "arrays": {leaf.name: leaf.describe() for leaf in plan.leaves},
        "files": {name: files.stamp(data) for name, data in (shapes | found).items()},
    }
    return found | {MANIFEST: files.seal(manifest)}


def _commit(path: Path, on_disk: bool, plan: Plan, small: Mapping[str, bytes]) -> None:
    partial = files.unfinished(path)
    folder = partial / ITEM
    for leaf in plan.leaves:
        lost = next((f for f in leaf.files() if not files.is_there(f"{folder}/{f}")), None)
        if lost is not None:
            raise UserError(f"{folder / lost} was written but is not there: another program removed it. Nothing was committed.")
    written = [files.write_file((folder / name).resolve(), data) for name, data in small.items()]
    if on_disk:
        files.flush_all(files.with_folders(written, partial.resolve()))
    files.publish(path)
