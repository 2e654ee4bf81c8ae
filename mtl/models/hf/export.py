"""Our arrays as a folder that transformers loads: tensors one at a time into safetensors files, the folder visible whole or not at all."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.errors import UserError
from mtl.models.decoder import Config
from mtl.models.hf.family import Family
from mtl.models.hf.files import CODES, INDEX, SINGLE
from mtl.models.hf.names import Row, give, their_shape
from mtl.params import ParamSpec

Read = Callable[[str, int | None], Tensor]
"""``read(path, layer)`` gives one layer of one of our arrays (``None``: the whole array), in the type that it has."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Theirs:
    """One tensor to write and the arrays of ours that it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[str, ParamSpec, Row, int | None], ...]

    @property
    def bytes(self) -> int:
        """Give its size."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def tensors(family: Family, config: Config, dtypes: Mapping[str, torch.dtype]) -> list[Theirs]:
    """List the tensors of a model in the order that they are written: layer by layer, what stands once around them."""
    found: dict[str, list[tuple[str, ParamSpec, Row, int | None]]] = {}
    rows = family.rows(config)
    head = ("norm.", "head.")
    for path, spec, row in [r for r in rows if r[1].axes[:1] != "L" and not r[0].startswith(head)]:
        found.setdefault(row.name, []).append((path, spec, row, None))
    for layer in range(config.layers):
        for path, spec, row in [r for r in rows if r[1].axes[:1] == "L"]:
            found.setdefault(row.name.format(layer), []).append((path, spec, row, layer))
    for path, spec, row in [r for r in rows if r[0].startswith(head)]:
        found.setdefault(row.name, []).append((path, spec, row, None))
    return [Theirs(name, _shape(parts[0]), _dtype(name, parts, dtypes), tuple(parts)) for name, parts in found.items()]


def shards(wanted: Sequence[Theirs], limit: int) -> dict[str, list[Theirs]]:
    """Share tensors out over files of at most ``limit`` bytes each; a tensor that is larger has a file of its own."""
    groups: list[list[Theirs]] = []
    room = 0
    for t in wanted:
        if not groups or t.bytes > room:
            groups.append([])
            room = limit
        groups[-1].append(t)
        room -= t.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def parse_size(text: str) -> int:
    """Read a number of bytes such as 500MB or 5GB (powers of ten) or 2GiB (of two)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found and found[2].upper() in UNITS else 0
    if size < 1:
        raise UserError(f"--shard-size is {text!r}: expected a number of bytes such as 500MB, 5GB or 2GiB.")
    return size


def write_tensors(path: Path, wanted: Sequence[Theirs], read: Read) -> None:
    """Write one safetensors file, byte for byte as the safetensors library would, holding one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    wanted = sorted(wanted, key=lambda t: (-t.dtype.itemsize, CODES[t.dtype], t.name))
    for t in wanted:
        header[t.name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.bytes]}
        end += t.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in wanted:
            out = torch.empty(t.shape, dtype=t.dtype)
            for ours, spec, row, layer in t.parts:
                values = read(ours, layer)
                _fits(t, values)
                give(row, spec.axes if layer is None else spec.axes[1:], values, out)
            file.write(out.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def index(files: Mapping[str, Sequence[Theirs]]) -> dict[str, Any] | None:
    """Make the index of several files, or None for one."""
    if len(files) == 1:
        return None
    total = sum(t.bytes for group in files.values() for t in group)
    placed = {t.name: file for file, group in files.items() for t in group}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


def begin(out: Path) -> Path:
    """Make the folder beside ``out`` that is written in."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already. An export overwrites nothing: choose another folder, or remove it first.")
    partial = unfinished(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error}.") from None
    return partial


def commit(out: Path, files: Mapping[str, Sequence[Theirs]], texts: Mapping[str, bytes]) -> None:
    """Write the small files and make the folder visible in one step."""
    partial, listing = unfinished(out), index(files)
    whole = dict(texts) if listing is None else {**texts, INDEX: (json.dumps(listing, indent=2) + "\n").encode()}
    for name, data in whole.items():
        with (partial / name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    handle = os.open(partial, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    partial.rename(out)


def unfinished(out: Path) -> Path:
    """Name the folder that an export is written in."""
    return out.with_name(out.name + UNFINISHED)


def _fits(t: Theirs, values: Tensor) -> None:
    """Refuse to turn finite values into infinite ones, whatever stands beside them."""
    most = torch.finfo(t.dtype).max
    if torch.finfo(values.dtype).max > most and values.numel():
        reach = values.abs().nan_to_num(0.0, 0.0).max().item()
        if reach > most:
            kind = str(t.dtype).removeprefix("torch.")
            raise UserError(f"{t.name} holds {reach:.4g}, but --dtype {kind} ends at {most:.4g}: choose another type.")


def _shape(part: tuple[str, ParamSpec, Row, int | None]) -> tuple[int, ...]:
    _, spec, row, layer = part
    return their_shape(row, spec.axes, spec.shape) if layer is None else their_shape(row, spec.axes[1:], spec.shape[1:])


def _dtype(name: str, parts: Sequence[tuple[str, ParamSpec, Row, int | None]], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    found = {dtypes[path] for path, *_ in parts}
    if len(found) > 1:
        raise UserError(f"{name} is made of {', '.join(p[0] for p in parts)}, which differ in type ({found}): choose one by --dtype.")
    kind = found.pop()
    if kind not in CODES:
        raise UserError(f"{name} has type {kind}, which Hugging Face's files do not have here: choose one by --dtype.")
    return kind
