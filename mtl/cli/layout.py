"""Show where every parameter lives on a mesh: `mtl layout --preset llama3_70b --mesh fsdp=64,tensor=8`. No devices are needed."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from experiments.presets import PRESETS
from experiments.pretrain import sizes
from mtl.cli.preset_flags import place, take_preset
from mtl.errors import UserError
from mtl.inspect.mesh import coordinates
from mtl.inspect.page import layout_page, size, write_page
from mtl.inspect.picture import Picture
from mtl.inspect.placement import Table, find_array, table
from mtl.models import decoder
from mtl.precision import PRECISIONS


@dataclass(frozen=True)
class LayoutSettings:
    """What to lay out."""

    model: decoder.Config
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    """Devices along each axis, such as fsdp=64,tensor=8; nothing is one device."""
    rules: str | None = None
    """A shipped table's name, a path to a table, or a module; by default chosen from the mesh."""
    device: int = 0
    """The device that the table shows."""
    array: str | None = None
    """Draw this one too: a parameter's path, or an activation's letters such as BRD."""
    precision: Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp8_rows"] = "bf16"
    share: float = 0.05
    """Mark a parameter that other devices hold too, where it takes more than this share of the device's bytes."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a page with pictures of all of them."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(arguments: list[str]) -> None:
    """Print the table, and write the page where asked."""
    name, preset, rest = take_preset(arguments)
    settings = tyro.cli(
        LayoutSettings, args=rest, default=LayoutSettings(preset.model), prog=f"mtl layout --preset {name}",
        description=f"{__doc__} Presets: {', '.join(PRESETS)}.", config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    if not 0 <= settings.share <= 1:
        raise UserError(f"--share is {settings.share}: it is a part of the device's bytes, from 0 to 1.")
    setup, rules, shape = place(dataclasses.replace(preset, model=settings.model), settings.mesh, settings.rules)
    specs = decoder.specs(settings.model)
    found = table(specs, rules, shape, PRECISIONS[settings.precision], settings.device, settings.share)
    picture = None
    if settings.array is not None:
        array = find_array(settings.array, specs, rules, shape, sizes(setup, rules, shape))
        picture = Picture(array, settings.device)
    if settings.html is not None:
        write_page(settings.html, layout_page(found, name))
    if settings.json:
        print(json.dumps(as_json(found, name)))
        return
    print(as_text(found, name))
    if picture is not None:
        Console(highlight=False).print("", picture, sep="\n")
    if settings.html is not None:
        print(f"\npictures: {settings.html}")


def as_json(found: Table, name: str) -> dict[str, object]:
    """Give the table as plain values."""
    rows = [
        {
            "path": r.path, "shape": r.shape, "axes": r.axes, "at_rest": r.rest.dims, "in_use": r.use.dims, "placement": r.notation,
            "offset": r.offset, "local_shape": r.local, "bytes_at_rest": r.rest_bytes, "bytes_gathered": r.gathered_bytes,
            "bytes_gathered_layer": r.layer_bytes,
            "copies": r.copies, "flagged": r.flagged,
        }
        for r in found.rows
    ]  # fmt: skip
    totals = {"bytes_at_rest": found.rest_bytes, "bytes_replicated": found.replicated_bytes}
    return {"preset": name, "rules": found.rules, "mesh": found.mesh.sizes(), "device": found.device, **totals, "parameters": rows}


def as_text(found: Table, name: str) -> str:
    """Draw the table in plain text."""
    head = ("parameter", "shape", "axes", "placement at rest", "local shape", "at rest", "gathered", "a layer", "copies", "")
    lines: list[tuple[str, ...]] = [head]
    for r in found.rows:
        shapes = ["x".join(str(n) for n in shape) for shape in (r.shape, r.local)]
        mark = f"replicated, over {found.share:.0%}" if r.flagged else ""
        sizes = [size(n) for n in (r.rest_bytes, r.gathered_bytes, r.layer_bytes)]
        lines.append((r.path, shapes[0], " ".join(r.axes), r.notation, shapes[1], *sizes, str(r.copies), mark))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    drawn = [
        "  ".join(cell.rjust(w) if 5 <= i <= 8 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]
    at = ", ".join(f"{axis}={index}" for axis, index in coordinates(found.mesh, found.device).items() if getattr(found.mesh, axis) > 1)
    share = found.replicated_bytes / max(found.rest_bytes, 1)
    return "\n".join(
        [
            f"{name} on mesh {found.mesh} ({found.mesh.devices()} devices), rules {found.rules}; device {found.device}{at and f' ({at})'}",
            "",
            *drawn,
            "",
            f"at rest on the device: {size(found.rest_bytes)}; of it on other devices too: {size(found.replicated_bytes)} ({share:.1%})",
        ]
    )
