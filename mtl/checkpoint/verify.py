"""Verify a checkpoint: read every tile of every array against its checksum, and every file beside them."""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtl.checkpoint import arrays, geometry
from mtl.checkpoint.contents import ArrayInfo, Contents, inspect
from mtl.checkpoint.peers import Damaged, Peers, peers
from mtl.checkpoint.restore import PIECE, pieces

AHEAD = 8


@dataclass(frozen=True)
class Found:
    """What a verification found: how much it read, and (array, file, what is wrong) of every damaged place."""

    bytes: int
    problems: tuple[tuple[str, str, str], ...]


def verify(path: str | Path) -> None:
    """Check a checkpoint whole, the processes that run together sharing the work; damage is raised on all of them."""
    group = peers()
    group.together(f"verify {path}", lambda: _raise(Path(path), find_damage(path, group)))


def find_damage(path: str | Path, group: Peers | None = None) -> Found:
    """Read this process's share of the arrays (everything, where it is alone) and list what does not match its checksum."""
    group = group or Peers()
    contents, ctx = inspect(path), arrays.context(8)
    problems: list[tuple[str, str, str]] = []
    waiting: deque[tuple[str, str, Any, Any]] = deque()
    read, turn = 0, 0

    def settle() -> None:
        name, file, future, _ = waiting.popleft()
        try:
            future.result()
        except (ValueError, OSError) as error:
            if not any(p[:2] == (name, file) for p in problems):
                problems.append((name, file, str(error).split(" [", maxsplit=1)[0]))

    for info in contents.arrays.values():
        try:
            array = arrays.open_old(contents.item, info.name, ctx, contents.driver, contents.ocdbt).result()
        except (ValueError, OSError) as error:
            problems.append((info.name, "zarr.json", str(error)))
            continue
        for cell in geometry.cells(((0,) * len(info.shape), info.shape), info.file or info.shape):
            turn += 1
            if turn % group.world != group.rank:
                continue
            for corner, part in pieces(cell, info, arrays.DTYPES[info.dtype].itemsize):
                buffer = torch.empty(part, dtype=arrays.DTYPES[info.dtype])
                waiting.append((info.name, _file(info, corner, contents), arrays.read_into(array, corner, arrays.as_numpy(buffer)), buffer))
                read += math.prod(part) * buffer.itemsize
                while len(waiting) > AHEAD or sum(b.nbytes for *_, b in waiting) > 4 * PIECE:
                    settle()
    while waiting:
        settle()
    return Found(read, tuple(problems))


def _file(info: ArrayInfo, corner: tuple[int, ...], contents: Contents) -> str:
    if not contents.by_mtl:
        return info.name
    return "/".join([info.name, "c", *(str(o // c) for o, c in zip(corner, info.file, strict=True))])


def _raise(path: Path, found: Found) -> None:
    if found.problems:
        shown = "; ".join(f"array {name!r} ({file}): {text}" for name, file, text in found.problems[:5])
        raise Damaged(f"{path} is damaged in {len(found.problems)} places: {shown}. Restore another checkpoint.")
