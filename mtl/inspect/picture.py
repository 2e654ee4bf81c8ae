"""A picture of an array on a mesh: its parts by colour, with the devices that hold them. Text in a terminal, SVG in a notebook."""

import colorsys
import html
import itertools
import math
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mtl.inspect.mesh import splits
from mtl.inspect.placement import Array

MOST = 16
"""The text picture draws this many parts of a dimension; the SVG four times as many."""


@dataclass(frozen=True)
class Picture:
    """An array's parts in a grid: the first two dimensions that are split give rows and columns; ``device`` is marked."""

    array: Array
    device: int | None = None

    def grid(self) -> tuple[int | None, int | None]:
        """Choose the dimensions that give rows and columns."""
        split = [i for i, axes in enumerate(self.array.layout.dims) if splits(self.array.mesh, axes) > 1]
        return (split[0] if split else None), (split[1] if len(split) > 1 else None)

    def counts(self) -> tuple[int, int]:
        """Count rows and columns."""
        dims = self.array.layout.dims
        rows, columns = (1 if d is None else splits(self.array.mesh, dims[d]) for d in self.grid())
        return rows, columns

    def slot(self, row: int, column: int) -> tuple[int, ...]:
        """Number the part in one cell; dimensions beside the grid's stay at the marked device's part, or 0."""
        slot = list(self.array.slot(self.device)) if self.device is not None else [0] * len(self.array.shape)
        for dim, index in zip(self.grid(), (row, column), strict=True):
            if dim is not None:
                slot[dim] = index
        return tuple(slot)

    def colour(self, row: int, column: int) -> tuple[int, int, int]:
        """Give a cell's colour: the hue goes with the column, or with the row where there is one column; rows then differ in light."""
        rows, columns = self.counts()
        hue = column / columns if columns > 1 else row / max(rows, 1)
        light = 0.62 + (0.22 * row / max(rows - 1, 1) if columns > 1 else 0.1)
        red, green, blue = colorsys.hls_to_rgb(0.85 * hue + 0.55, light, 0.55)
        return round(red * 255), round(green * 255), round(blue * 255)

    def title(self) -> str:
        """Say what is drawn, and what is beside it."""
        a = self.array
        size = "x".join(str(n) for n in a.shape)
        rest = [i for i, axes in enumerate(a.layout.dims) if splits(a.mesh, axes) > 1 and i not in self.grid()]
        beside = "" if not rest else "; one slice of " + ", ".join(a.letters[i] for i in rest)
        copies = "" if a.copies() == 1 else f", each on {a.copies()} devices"
        return f"{a.path} {size} {a.notation()} on {a.mesh}: {a.parts()} part{'s' * (a.parts() > 1)}{copies}{beside}"

    def describe(self, row: int, column: int) -> str:
        """Say which elements a cell holds, and where they are."""
        a, slot = self.array, self.slot(row, column)
        held = list(itertools.islice(a.holders(slot), 5))
        offset, local = a.box(held[0])
        dims = (d for d in self.grid() if d is not None)
        what = ", ".join(f"{a.letters[d]} {offset[d]}:{offset[d] + local[d]}" for d in dims) or "everything"
        more = f" and {a.copies() - len(held)} more" if a.copies() > len(held) else ""
        return f"{what} on device{'s' * (a.copies() > 1)} {', '.join(str(d) for d in held)}{more}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it with colours."""
        yield Text(self.title())
        rows, columns = self.counts()
        marked = None if self.device is None else self.array.slot(self.device)
        wide = max(len(str(self.array.mesh.devices() - 1)), 2) + 2
        most = max(1, min(MOST, (options.max_width - 8) // wide))
        for row in range(min(rows, MOST)):
            line = Text("  ")
            for column in range(min(columns, most)):
                first = next(self.array.holders(self.slot(row, column)))
                mark = "*" if marked == self.slot(row, column) else " "
                line.append(f"{first}{mark}".rjust(wide), style=f"black on rgb({','.join(str(c) for c in self.colour(row, column))})")
            yield line + (f" ... {columns} columns" if columns > most and row == 0 else "")
        if rows > MOST:
            yield Text(f"  ... {rows} rows")
        yield Text("  (a cell names the first device that holds the part" + ("; * marks the device asked for)" if marked else ")"))

    def __repr__(self) -> str:
        """Draw it as plain text."""
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def _repr_html_(self) -> str:
        """Draw it as SVG, with hover text."""
        rows, columns = (min(n, 4 * MOST) for n in self.counts())
        wide, high = 640 / columns, max(12.0, min(60.0, 320 / rows))
        cells: list[str] = []
        marked = None if self.device is None else self.array.slot(self.device)
        for row, column in itertools.product(range(rows), range(columns)):
            red, green, blue = self.colour(row, column)
            place = f'x="{column * wide:.1f}" y="{row * high:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            edge = 'stroke="#000" stroke-width="2"' if marked == self.slot(row, column) else 'stroke="#fff" stroke-width="0.5"'
            about = html.escape(self.describe(row, column))
            cells.append(f'<rect {place} fill="rgb({red},{green},{blue})" {edge}><title>{about}</title></rect>')
            if wide > 34 and high > 14:
                first = next(self.array.holders(self.slot(row, column)))
                middle = f'x="{(column + 0.5) * wide:.1f}" y="{(row + 0.5) * high + 4:.1f}"'
                cells.append(f'<text {middle} text-anchor="middle" font-size="11" pointer-events="none">{first}</text>')
        cut = "" if math.prod(self.counts()) == rows * columns else f" (the first {rows} x {columns} parts)"
        return (
            f'<div style="font:13px sans-serif"><div>{html.escape(self.title())}{cut}</div>'
            f'<svg viewBox="0 0 640 {rows * high:.0f}" style="width:100%;max-width:640px">{"".join(cells)}</svg></div>'
        )
