"""Self-contained HTML pages: one file with its style, its script and its data, readable on a phone and without a network."""

import html
import json
from pathlib import Path
from typing import Any

from mtl.errors import UserError
from mtl.inspect.placement import Row, Table

WEB = Path(__file__).parent / "web"


def page(title: str, body: str, script: str, data: Any) -> str:
    """Put a page together; ``script`` names a file of web/, and finds ``data`` in the constant DATA."""
    # "<" never appears in the data, so that no text in it can end the script.
    packed = json.dumps(data).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{(WEB / 'style.css').read_text()}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>\n{body}</main>\n"
        f"<script>const DATA = {packed};\n{(WEB / script).read_text()}</script></body></html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Write a page, or say why it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path} cannot be written: {error}.") from None


def layout_page(table: Table, name: str) -> str:
    """Make the page of `mtl layout`: the parameters, and a picture of the one that is chosen."""
    head = ["parameter", "placement", "shape", "here", "at rest", "gathered", "a layer", "copies"]
    rows = "".join(_row(i, row) for i, row in enumerate(table.rows))
    share = table.replicated_bytes / max(table.rest_bytes, 1)
    body = (
        f"<p>{html.escape(name)} on mesh <b>{table.mesh}</b> ({table.mesh.devices():,} devices), rules <b>{html.escape(table.rules)}</b>, "
        f"seen from device <b id=device>{table.device}</b>.</p>"
        f'<p class="tiles"><span><b id=rest data-bytes="{table.rest_bytes}">{size(table.rest_bytes)}</b> at rest on the device</span>'
        f'<span><b id=replicated data-bytes="{table.replicated_bytes}">{size(table.replicated_bytes)}</b> of it on other devices too '
        f"({share:.1%})</span></p>"
        "<section id=picture><h2 id=what></h2><p id=about></p><h3>The array</h3><canvas id=array></canvas><h3>The devices</h3>"
        "<canvas id=mesh></canvas><p id=readout aria-live=polite>Touch a part or a device.</p></section>"
        f'<div class="wide"><table id=parameters><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        "<p class=note>At rest: bytes of the parameter's own type. Gathered: the whole array as products use it; "
        "a layer's part of it is there at a time, or all at once where the table gathers once a step. "
        "A row is marked where other devices hold the same part and it takes "
        f"more than {table.share:.0%} of the device's bytes.</p>"
    )
    arrays = [
        {"path": r.path, "axes": r.axes, "shape": r.shape, "dims": r.rest.dims, "notation": r.notation, "copies": r.copies}
        for r in table.rows
    ]
    data = {"mesh": table.mesh.sizes(), "arrays": arrays, "device": table.device}
    return page(f"Layout of {name}", body, "layout.js", data)


def size(count: float) -> str:
    """Spell a number of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _row(i: int, row: Row) -> str:
    def times(shape: tuple[int, ...]) -> str:
        return " x ".join(str(n) for n in shape)

    cells = [
        f'<td><button data-array="{i}">{html.escape(row.path)}</button></td>',
        f"<td><code>{_subscript(row.notation)}</code></td>",
        f"<td>{times(row.shape)}</td><td>{times(row.local)}</td>",
        f'<td class=number data-bytes="{row.rest_bytes}">{size(row.rest_bytes)}</td>',
        f'<td class=number data-bytes="{row.gathered_bytes}">{size(row.gathered_bytes)}</td>',
        f'<td class=number data-bytes="{row.layer_bytes}">{size(row.layer_bytes)}</td>',
        f"<td class=number>{row.copies:,}</td>",
    ]
    return f"<tr{' class=flagged' if row.flagged else ''}>{''.join(cells)}</tr>"


def _subscript(notation: str) -> str:
    parts = html.escape(notation).split("_")
    out = parts[0]
    for part in parts[1:]:
        if part.startswith("{"):
            inner, _, rest = part[1:].partition("}")
            out += f"<sub>{inner}</sub>{rest}"
        else:
            inner = part.split(",")[0].split("]")[0]
            out += f"<sub>{inner}</sub>{part[len(inner) :]}"
    return out
