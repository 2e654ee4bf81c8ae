"""Pictures of timelines: a list of boxes and words, written as SVG or as PNG by a few lines each, so that drawing needs no library."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from mtl.errors import UserError
from mtl.pipeline.simulate import Timeline

COLOURS = {"F": "#7fb2e5", "B": "#f2a65a", "W": "#8fcf87"}
LATER = {"F": "#c3dcf3", "B": "#fad7b0", "W": "#cbe9c7"}
"""Paler, for every second stage of a device."""
INK, LINE = "#222222", "#ffffff"
MEANING = {"F": "forward", "B": "backward", "W": "weights' gradients"}
LEFT, TOP, ROW, GAP, WIDTH = 92, 44, 30, 26, 1400  # LEFT has room for "device 100"


@dataclass(frozen=True)
class Mark:
    """A box of ``fill`` with words in it, or words alone: at (x, y), in pixels."""

    x: float
    y: float
    width: float
    height: float
    fill: str | None
    words: str = ""
    anchor: str = "middle"


def write(timelines: Sequence[Timeline], path: Path, unit: str = "") -> None:
    """Draw timelines one under the other into ``path`` (.svg or .png): devices by time, coloured by kind, bubbles white."""
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise UserError(f"--out {path}: the name must end in .svg or .png.")
    marks, size = layout(timelines, unit)
    try:
        if kind == ".svg":
            path.write_text(svg(marks, size))
        else:
            path.write_bytes(png(marks, size))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error}.") from None


def layout(timelines: Sequence[Timeline], unit: str = "") -> tuple[list[Mark], tuple[int, int]]:
    """Place every action; give the marks and the picture's size."""
    marks: list[Mark] = []
    top = 8.0
    for timeline in timelines:
        first = min(span.start for row in timeline.spans for span in row)
        scale = (WIDTH - LEFT - 12) / timeline.length
        stored = f", stores at most {max(timeline.stored)}" if timeline.stored else ""
        length = f"{timeline.length:.4g}{unit}"
        name = timeline.name if len(timeline.name) <= 60 else f"...{timeline.name[-57:]}"  # a file's end says more than its beginning
        title = f"{name}: time {length}, bubble {timeline.bubble:.1%}{stored}"
        marks.append(Mark(LEFT, top, 0, 18, None, title, "start"))
        for i, kind in enumerate(k for k in COLOURS if any(s.action.kind == k for row in timeline.spans for s in row)):
            marks.append(Mark(WIDTH - 500 + 160 * i, top, 18, 18, COLOURS[kind]))
            marks.append(Mark(WIDTH - 476 + 160 * i, top, 0, 18, None, MEANING[kind], "start"))
        top += TOP - 8
        for device, row in enumerate(timeline.spans):
            marks.append(Mark(LEFT - 10, top, 0, ROW - 4, None, f"device {device}", "end"))
            own = sorted({span.action.stage for span in row})
            for span in row:
                x, width = LEFT + (span.start - first) * scale, (span.end - span.start) * scale
                fill = (COLOURS, LATER)[own.index(span.action.stage) % 2][span.action.kind]
                words = str(span.action) if len(own) > 1 else str(span.action.micro)
                marks.append(Mark(x, top, width, ROW - 4, fill, words if width >= 7 * len(words) + 2 else ""))
            top += ROW
        top += GAP
    return marks, (WIDTH, round(top))


def svg(marks: Sequence[Mark], size: tuple[int, int]) -> str:
    """Write marks as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>',
    ]
    for m in marks:
        if m.fill is not None:
            lines.append(
                f'<rect x="{m.x:.2f}" y="{m.y:.2f}" width="{m.width:.2f}" height="{m.height:.2f}" fill="{m.fill}" stroke="{LINE}"/>'
            )
        if m.words:
            x = m.x + (m.width / 2 if m.anchor == "middle" else 0)
            lines.append(f'<text x="{x:.2f}" y="{m.y + m.height / 2 + 4:.2f}" text-anchor="{m.anchor}">{escape(m.words)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def png(marks: Sequence[Mark], size: tuple[int, int]) -> bytes:
    """Write marks as PNG, with letters of 3 by 5 points."""
    picture = np.full((size[1], size[0], 3), 255, np.uint8)
    for m in marks:
        if m.fill is not None:
            rows, columns = slice(round(m.y), round(m.y + m.height)), slice(round(m.x), max(round(m.x + m.width) - 1, round(m.x) + 1))
            picture[rows, columns] = _rgb(m.fill)
        if m.words:
            _write_words(picture, m)
    lines = np.concatenate([np.zeros((size[1], 1), np.uint8), picture.reshape(size[1], -1)], 1)
    header = struct.pack(">IIBBBBB", size[0], size[1], 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


_LETTERS = (
    "0=75557 1=26227 2=71747 3=71717 4=55711 5=74717 6=74757 7=71122 8=75757 9=75717 A=25755 B=65656 C=34443 D=65556 E=74647 F=74644 "
    "G=34553 H=55755 I=72227 J=11152 K=55655 L=44447 M=57755 N=65555 O=25552 P=65644 Q=25573 R=65655 S=34216 T=72222 U=55557 V=55552 "
    "W=55775 X=55255 Y=55222 Z=71247 .=00002 ,=00024 :=02020 %=51245 -=00700 _=00007 /=11244 (=12221 )=42224 '=22000 +=02720"
)
"""Each letter is five rows of three points, a row an octal digit."""
_FONT = {word[0]: word[2:] for word in _LETTERS.split()}


def _write_words(picture: np.ndarray, mark: Mark) -> None:
    scale = 2
    letters = [_FONT.get(c, "00000") for c in mark.words.upper()]
    wide = len(letters) * 4 * scale - scale
    left = max(0, round(mark.x + {"middle": (mark.width - wide) / 2, "start": 0, "end": -wide}[mark.anchor]))
    top = round(mark.y + (mark.height - 5 * scale) / 2)
    for i, letter in enumerate(letters):
        for row, digit in enumerate(letter):
            for column in range(3):
                if int(digit, 8) >> (2 - column) & 1:
                    y, x = top + row * scale, left + (i * 4 + column) * scale
                    picture[y : y + scale, x : x + scale] = _rgb(INK)
