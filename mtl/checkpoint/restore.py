"""Restore a checkpoint onto any mesh: each process reads the bytes of its own parts, and no more."""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import tree
from mtl.checkpoint import arrays, geometry
from mtl.checkpoint.contents import ArrayInfo, Contents, inspect
from mtl.checkpoint.files import in_memory, is_local
from mtl.checkpoint.geometry import Box
from mtl.checkpoint.peers import CheckpointError, Damaged, Peers, peers
from mtl.errors import UserError

PIECE = 64 << 20
"""Bytes read at once into a buffer that is then moved or cast; where neither is needed, values are read in place."""
BUFFERS = 4


def restore(path: str | Path, abstract_state: tree.Tree, *, subset: bool | None = None) -> tree.Tree:
    """Read a checkpoint, mtl's or Orbax's, into the structure, layouts and types of ``abstract_state``; every process calls this alike.

    Leaves of ``abstract_state`` are DTensors or tensors, on the meta device if they should take no memory; the result is new and lies on
    the mesh's device (a plain meta leaf comes to the CPU). Floating-point types may differ from the stored ones and are cast. Names,
    shapes and types are compared before anything is read: what is missing, extra or different is listed by path.

    By default a tree may leave out whole branches at its top (``{"params": ...}`` alone), with ``subset=True`` any leaf, with False none.
    """
    contents = inspect(path)
    leaves = [(name, x) for name, x in tree.paths(abstract_state) if x is not None]
    tops = {str(keys[0]) for keys, _ in tree.keyed(abstract_state) if keys}
    compare(contents, leaves, tops, subset)
    made: dict[str, Tensor] = {}
    group = peers() if any(isinstance(x, DTensor) for _, x in leaves) else Peers()
    group.together(f"restore {contents.path}", lambda: made.update(read_leaves(contents, leaves)))
    return tree.map_paths(lambda name, x: None if x is None else wrap(x, made[name]), abstract_state)


def compare(contents: Contents, leaves: Sequence[tuple[str, Any]], tops: set[str], subset: bool | None) -> None:
    """Refuse a tree that is not the checkpoint's, listing every difference by path."""
    wanted, stored = dict(leaves), contents.arrays
    problems = [f"{name}: not in the checkpoint" for name in wanted if name not in stored]
    problems += [f"{name}: in the checkpoint, but not asked for" for name in _extra(wanted, stored, tops, subset)]
    for name, x in leaves:
        if not isinstance(x, Tensor):
            raise UserError(f"leaf {name!r} of the tree to restore is a {type(x).__name__}: expected a tensor or DTensor (meta is enough).")
        if name not in stored:
            continue
        info = stored[name]
        if tuple(x.shape) != info.shape:
            problems.append(f"{name}: shape {info.shape} in the checkpoint, {tuple(x.shape)} asked for")
        if not _castable(arrays.DTYPES[info.dtype], x.dtype):
            problems.append(f"{name}: type {info.dtype} in the checkpoint, {str(x.dtype).removeprefix('torch.')} asked for")
    if problems:
        shown = "\n  ".join(problems[:40] + ([f"... and {len(problems) - 40} more"] if len(problems) > 40 else []))
        raise CheckpointError(f"{contents.path} does not fit the tree to restore; nothing was read.\n  {shown}")


def read_leaves(contents: Contents, leaves: Sequence[tuple[str, Any]], threads: int = 8) -> dict[str, Tensor]:
    """Read this process's part of every leaf."""
    ctx = arrays.context(threads)
    boxes = {name: local_box(name, x) for name, x in leaves}
    near, memory = contents.by_mtl and is_local(contents.item), in_memory(contents.item)

    def opened(name: str) -> Any:
        info = contents.arrays[name]
        mapped = near and (memory or geometry.whole(boxes[name], info.shape, info.file))
        return arrays.open_old(contents.item, name, ctx, contents.driver, contents.ocdbt, mapped)

    opening = {name: opened(name) for name, _ in leaves}
    made: dict[str, Tensor] = {}
    waiting: deque[tuple[str, Any, Any, Tensor | None]] = deque()

    def settle() -> None:
        name, future, target, buffer = waiting.popleft()
        _result(contents, name, future)
        if buffer is not None:
            target.copy_(buffer)

    for name, x in leaves:
        info, array = contents.arrays[name], _result(contents, name, opening[name])
        if tuple(array.shape) != info.shape or array.dtype.name != info.dtype:
            raise Damaged(f"{contents.item / name}: the array is not what the checkpoint lists. Restore another checkpoint.")
        offset, shape = boxes[name]
        device = torch.device(x.device_mesh.device_type) if isinstance(x, DTensor) else x.device
        device = torch.device("cpu") if device.type == "meta" else device
        made[name] = local = arrays.empty(shape, x.dtype) if device.type == "cpu" else torch.empty(shape, dtype=x.dtype, device=device)
        stored = arrays.DTYPES[info.dtype]
        if 0 in shape:
            continue
        if device.type == "cpu" and stored == x.dtype:
            waiting.append((name, arrays.read_into(array, offset, arrays.as_numpy(local)), None, None))
            continue
        for corner, part in pieces((offset, shape), info, stored.itemsize):
            while sum(buffer is not None for *_, buffer in waiting) >= BUFFERS:
                settle()
            buffer = torch.empty(part, dtype=stored, pin_memory=device.type == "cuda")
            target = local[tuple(slice(c - o, c - o + n) for c, n, o in zip(corner, part, offset, strict=True))]
            waiting.append((name, arrays.read_into(array, corner, arrays.as_numpy(buffer)), target, buffer))
    while waiting:
        settle()
    return made


def local_box(name: str, x: Tensor) -> Box:
    """Give the box of a leaf that this process holds."""
    if not isinstance(x, DTensor):
        return (0,) * x.dim(), tuple(x.shape)
    place: Any = x.device_mesh.get_coordinate()
    offset, shape = geometry.split_of(name, x, 1).box(place)
    if shape != tuple(x.to_local().shape):
        raise UserError(f"leaf {name!r}: this process holds {tuple(x.to_local().shape)} of it, but placements {x.placements} give {shape}.")
    return offset, shape


def pieces(box: Box, info: ArrayInfo, itemsize: int) -> Iterator[Box]:
    """Cut a box into parts of about `PIECE` bytes along whole tiles."""
    offset, shape = box
    size = list(shape)
    for d, n in enumerate(shape):
        if math.prod(size) * itemsize <= PIECE:
            break
        tile = max(1, info.tile[d]) if d < len(info.tile) else 1
        each = max(1, PIECE // (math.prod(size) // n * itemsize))
        size[d] = min(n, max(tile, each // tile * tile))
    lines: list[list[tuple[int, int]]] = []
    for o, n, step in zip(offset, shape, size, strict=True):
        cuts = [o, *range((o // step + 1) * step, o + n, step), o + n]
        lines.append([(a, b - a) for a, b in itertools.pairwise(cuts)])
    for place in geometry.places([range(len(line)) for line in lines]):
        yield (
            tuple(line[i][0] for i, line in zip(place, lines, strict=True)),
            tuple(line[i][1] for i, line in zip(place, lines, strict=True)),
        )


def wrap(x: Any, local: Tensor) -> Tensor:
    """Give a leaf the layout of the abstract one."""
    if not isinstance(x, DTensor):
        return local
    return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def _extra(wanted: Mapping[str, Any], stored: Mapping[str, ArrayInfo], tops: set[str], subset: bool | None) -> list[str]:
    extra = [name for name in stored if name not in wanted]
    if subset is not None:
        return [] if subset else extra
    branch_left_out = any(len(stored[name].keys) > 1 and str(stored[name].keys[0]) not in tops for name in extra)
    return [name for name in extra if str(stored[name].keys[0]) in tops or not branch_left_out]


def _castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    if stored == wanted or (stored.is_floating_point and wanted.is_floating_point):
        return True
    whole = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    return stored in whole and wanted in whole and wanted.itemsize > stored.itemsize


def _result(contents: Contents, name: str, future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError) as error:
        raise Damaged(f"{contents.path}: array {name!r} is damaged or incomplete, and nothing was restored: {error}") from None
