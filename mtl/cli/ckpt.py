"""Look at checkpoints and work on them: inspect, verify, export-safetensors, average, rechunk."""

import contextlib
import dataclasses
import html
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from mtl import checkpoint, tree
from mtl.checkpoint import arrays, geometry
from mtl.checkpoint.contents import ArrayInfo, Contents
from mtl.checkpoint.geometry import Box
from mtl.checkpoint.store import Store
from mtl.checkpoint.verify import find_damage
from mtl.errors import UserError, unknown

Folder = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Inspect:
    """Show what a checkpoint holds: step, settings, arrays with shapes, types, bytes and files; or how it differs from another."""

    dir: Folder
    """The checkpoint, or a run's folder (then its newest checkpoint)."""
    diff: Path | None = None
    """Another checkpoint to compare with: names, shapes, types, settings and values."""
    html: Path | None = None
    """Write the listing (and the differences) as a page to this file; without a name, to checkpoint-NAME.html here."""


@dataclass(frozen=True)
class Verify:
    """Read every byte of a checkpoint and compare it with its checksum."""

    dir: Folder


@dataclass(frozen=True)
class Export:
    """Write arrays into a safetensors file, under the names they have in the checkpoint."""

    dir: Folder
    out: Annotated[Path, tyro.conf.Positional]
    only: str = ""
    """Arrays whose names begin so, such as params; by default all."""


@dataclass(frozen=True)
class Average:
    """Average the arrays of several checkpoints, in float64, into a new one; whole numbers are the newest's."""

    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path
    only: str = ""
    """Arrays whose names begin so, such as params; by default all."""


@dataclass(frozen=True)
class Rechunk:
    """Write a checkpoint anew with files that fit a mesh: as many parts along each dimension as its devices split it into."""

    dir: Folder
    out: Annotated[Path, tyro.conf.Positional]
    parts: tuple[str, ...] = ()
    """NAME=P,P,...: parts along each dimension of the arrays whose names begin so, such as params.layers=1,8; the rest stays whole."""


HERE = "."
"""What stands for a page's own name in this folder."""
COMMANDS: Mapping[str, Any] = {"inspect": Inspect, "verify": Verify, "export-safetensors": Export, "average": Average, "rechunk": Rechunk}


def main(arguments: list[str]) -> None:
    """Run one of the commands."""
    if not arguments or arguments[0] in ("-h", "--help"):
        about = "\n".join(f"  {name:20} {(kind.__doc__ or '').strip()}" for name, kind in COMMANDS.items())
        print(f"usage: mtl ckpt COMMAND ... (mtl ckpt COMMAND --help says more)\n\n{about}")
        return
    if arguments[0] not in COMMANDS:
        raise unknown("command of mtl ckpt", arguments[0], COMMANDS)
    asked = tyro.cli(COMMANDS[arguments[0]], args=named(arguments[1:]), prog=f"mtl ckpt {arguments[0]}")
    runs: Mapping[type, Callable[[Any], None]] = {Inspect: inspect, Verify: verify, Export: export, Average: average, Rechunk: rechunk}
    runs[type(asked)](asked)


def named(arguments: list[str]) -> list[str]:
    """Give ``--html`` a name where it has none: it stands last, before another option, or before the checkpoint's folder."""
    if "--html" not in arguments:
        return arguments
    i = arguments.index("--html")
    after = arguments[i + 1 : i + 2]
    if after and not after[0].startswith("-") and not Path(after[0]).is_dir():
        return arguments
    return [*arguments[: i + 1], HERE, *arguments[i + 1 :]]


def find(path: Path) -> Path:
    """Take a checkpoint's folder, or the newest under a run's folder, damaged or not."""
    for folder in (path, path / "checkpoints"):
        if found := Store(folder).found():
            return folder / str(found[-1])
    return path


def inspect(asked: Inspect) -> None:
    """Print the listing, or the differences."""
    contents = checkpoint.inspect(find(asked.dir))
    other = None if asked.diff is None else checkpoint.inspect(find(asked.diff))
    out = Path(f"checkpoint-{contents.path.name}.html") if asked.html == Path(HERE) else asked.html
    if out is not None:
        _refuse_existing(out)
    lines = None if other is None else list(differences(contents, other)) or ["no differences"]
    if out is not None:
        _write(out, lambda path: path.write_text(page(contents, other, lines)))
        return
    if lines is not None:
        print("\n".join(lines))
        return
    for name, value in facts(contents).items():
        print(f"{name + ':':12} {value}")
    rows = table(contents)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    if contents.config is not None:
        print("config:", json.dumps(contents.config))


def facts(contents: Contents) -> dict[str, str]:
    """Say the few things one looks for first."""
    host = contents.host if isinstance(contents.host, dict) else {}
    size = sum(a.bytes for a in contents.arrays.values())
    elements = sum(math.prod(a.shape) for n, a in contents.arrays.items() if n.startswith("params."))
    return {
        "checkpoint": str(contents.path),
        "format": f"mtl, {contents.driver}" if contents.by_mtl else f"Orbax, {contents.driver}{' in ocdbt' if contents.ocdbt else ''}",
        **{name: json.dumps(value) for name, value in host.items()},
        "arrays": f"{len(contents.arrays)}, {size / 2**20:,.1f} MiB" + (f", {elements:,} parameters" if elements else ""),
        "files": ", ".join(contents.files) or "none",
    }


def table(contents: Contents) -> list[tuple[str, ...]]:
    """List one row an array."""
    rows = [("array", "type", "shape", "MiB", "files", "file", "tile")]
    for name, a in contents.arrays.items():
        files = math.prod(-(-n // c) for n, c in zip(a.shape, a.file, strict=True)) if a.file else 1
        rows.append((name, a.dtype, _shape(a.shape), f"{a.bytes / 2**20:.3f}", str(files), _shape(a.file), _shape(a.tile)))
    return rows


def page(contents: Contents, other: Contents | None = None, lines: Iterable[str] | None = None) -> str:
    """Draw the listing, and what differs from another checkpoint, as one HTML page that needs nothing else."""

    def cells(row: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head, *rows = table(contents)
    listed = "".join(f"<dt>{html.escape(n)}</dt><dd>{html.escape(v)}</dd>" for n, v in facts(contents).items())
    config = html.escape(json.dumps(contents.config, indent=2))
    against = "" if other is None else f"<h2>Against {html.escape(str(other.path))}</h2><pre>{html.escape(chr(10).join(lines or ()))}</pre>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(contents.path.name)}</title>'
        "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:2px 12px 2px 0;text-align:left}"
        "tr:nth-child(even){background:#f3f3f3}dt{font-weight:bold}td{font-family:monospace}</style>"
        f"<h1>{html.escape(str(contents.path))}</h1><dl>{listed}</dl>{against}"
        f"<table>{cells(head, 'th')}{''.join(cells(r, 'td') for r in rows)}</table>"
        f"<details><summary>settings</summary><pre>{config}</pre></details></html>\n"
    )


def differences(a: Contents, b: Contents) -> Iterator[str]:
    """List what differs between two checkpoints."""
    for name in sorted({*a.arrays, *b.arrays}):
        one, two = a.arrays.get(name), b.arrays.get(name)
        if one is None or two is None:
            yield f"{name}: only in {(a if two is None else b).path}"
        elif (one.shape, one.dtype) != (two.shape, two.dtype):
            yield f"{name}: {one.dtype} {_shape(one.shape)} | {two.dtype} {_shape(two.shape)}"
        else:
            most = max(_distance(_part(a, one, box), _part(b, two, box)) for box in _boxes(one))
            if most > 0:
                yield f"{name}: values differ by up to {most:.3g}"
    for kind, one, two in (("config", a.config, b.config), ("host", a.host, b.host)):
        left, right = (dict(_flat(x)) for x in (one, two))
        for key in sorted({*left, *right}):
            if left.get(key) != right.get(key):
                yield f"{kind} {key}: {json.dumps(left.get(key))} | {json.dumps(right.get(key))}"


def verify(asked: Verify) -> None:
    """Print what is damaged, or that nothing is."""
    path = find(asked.dir)
    found = find_damage(path)
    for name, file, text in found.problems:
        print(f"damaged: array {name!r}, file {file}: {text}")
    if found.problems:
        raise UserError(f"{path} is damaged in {len(found.problems)} places. Restore another checkpoint.")
    said = "are as they were written" if checkpoint.inspect(path).by_mtl else "can be read; it is not mtl's and may have no checksums"
    print(f"{path}: all {found.bytes / 2**20:,.1f} MiB {said}")


def export(asked: Export) -> None:
    """Write the file."""
    _refuse_existing(asked.out)
    contents = checkpoint.inspect(find(asked.dir))
    target = _target(contents, asked.only)
    values = dict(tree.paths(checkpoint.restore(contents.path, target, subset=True)))
    _write(asked.out, lambda path: save_file({name: arrays.as_numpy(x) for name, x in values.items()}, path), f" ({len(values)} arrays)")


def average(asked: Average) -> None:
    """Write the average."""
    if len(asked.dirs) < 2:
        raise UserError("mtl ckpt average needs at least two checkpoints.")
    contents = [checkpoint.inspect(find(path)) for path in asked.dirs]
    target = _target(contents[-1], asked.only)
    for c in contents[:-1]:
        _must_match(contents[-1], c, asked.only)

    def part(name: str, box: Box) -> Tensor:
        parts = [_part(c, c.arrays[name], box) for c in contents]
        return _mean(parts)

    host = {"average_of": [str(c.path) for c in contents], **(contents[-1].host if isinstance(contents[-1].host, dict) else {})}
    checkpoint.save(asked.out, target, part=part, host=host, config=contents[-1].config, extra=dict(contents[-1].files))
    print(f"written: {asked.out}, the average of {len(contents)}")


def rechunk(asked: Rechunk) -> None:
    """Write the same values into other files."""
    contents = checkpoint.inspect(find(asked.dir))
    wanted: dict[str, tuple[int, ...]] = {}
    for text in asked.parts:
        name, _, parts = text.partition("=")
        if not parts or not all(p.isdecimal() and int(p) > 0 for p in parts.split(",")):
            raise UserError(f"--parts {text!r}: expected NAME=P,P,..., such as params.embed=8,1.")
        if not any(n.startswith(name) for n in contents.arrays):
            raise unknown("array in --parts", name, contents.arrays)
        wanted[name] = tuple(int(p) for p in parts.split(","))

    def files(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        parts = next((p for n, p in wanted.items() if name.startswith(n)), None)
        if parts is None:
            return None
        if len(parts) != len(shape):
            raise UserError(f"--parts gives {len(parts)} numbers for array {name!r}, which has {len(shape)} dimensions.")
        return tuple(-(-n // p) for n, p in zip(shape, parts, strict=True))

    def part(name: str, box: Box) -> Tensor:
        return _part(contents, contents.arrays[name], box)

    checkpoint.save(
        asked.out, _target(contents, ""), part=part, host=contents.host, config=contents.config, extra=dict(contents.files), files_of=files
    )
    print(f"written: {asked.out}")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; nothing was written. Choose another name, or remove it first.")


def _write(out: Path, write: Callable[[Path], Any], more: str = "") -> None:
    """Write a file whole or not at all, and say so."""
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{out} cannot be written: {error}. Nothing of it was kept.") from None
    print(f"written: {out}{more}")


def _target(contents: Contents, only: str) -> Any:
    known = {name: a for name, a in contents.arrays.items() if name.startswith(only)}
    if not known:
        raise unknown("array", only, contents.arrays)
    return checkpoint.structure(
        dataclasses.replace(contents, arrays=known),
        lambda a: torch.empty(a.shape, dtype=arrays.DTYPES[a.dtype], device="meta"),
    )


def _part(contents: Contents, info: ArrayInfo, box: Box) -> Tensor:
    out = torch.empty(box[1], dtype=arrays.DTYPES[info.dtype])
    array = arrays.open_old(contents.item, info.name, arrays.context(), contents.driver, contents.ocdbt).result()
    try:
        arrays.read_into(array, box[0], arrays.as_numpy(out)).result()
    except (ValueError, OSError) as error:
        raise checkpoint.CheckpointError(f"{contents.path}: array {info.name!r} is damaged: {error}") from None
    return out


def _boxes(info: ArrayInfo) -> Iterator[Box]:
    return geometry.cells(((0,) * len(info.shape), info.shape), info.file or info.shape)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8)):
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float(np.nan_to_num((a.to(wide) - b.to(wide)).abs().max().item(), nan=math.inf)) or math.inf


def _mean(parts: list[Tensor]) -> Tensor:
    if not parts[0].is_floating_point() or not parts[0].ndim:  # counts and scales, which belong to the last
        return parts[-1]
    return (tree.total(p.double() for p in parts) / len(parts)).to(parts[0].dtype)


def _must_match(a: Contents, b: Contents, only: str) -> None:
    for name, info in a.arrays.items():
        other = b.arrays.get(name)
        if name.startswith(only) and (other is None or (other.shape, other.dtype) != (info.shape, info.dtype)):
            what = "is missing" if other is None else f"is {other.dtype} {_shape(other.shape)}"
            raise UserError(
                f"array {name!r} {what} in {b.path}, and {info.dtype} {_shape(info.shape)} in {a.path}: they cannot be averaged."
            )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape) or "scalar"
