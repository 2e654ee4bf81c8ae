"""Counts and lengths of a corpus, and their histogram as text and as a picture."""

import math
from dataclasses import dataclass

import numpy as np

from mtl.data.indexed import Indexed, Tokens
from mtl.errors import UserError

_BLOCK = 1 << 20
_EXACT = 1 << 20
"""Lengths up to this are counted one by one; percentiles beyond it are those of their power of two."""


@dataclass(frozen=True)
class Lengths:
    """How long the documents of a corpus are, in tokens."""

    documents: int
    empty: int
    shortest: int
    longest: int
    mean: float
    percentiles: dict[int, int]
    bins: tuple[tuple[int, int, int], ...]
    """(from, to, how many documents), by powers of two, 0 apart."""


def document_lengths(corpus: Indexed) -> Lengths:
    """Measure every document, some at a time."""
    exact = np.zeros(_EXACT + 1, dtype=np.int64)
    powers = np.zeros(65, dtype=np.int64)
    shortest, longest, total = 2**63 - 1, 0, 0
    for i in range(0, corpus.documents, _BLOCK):
        lengths = _lengths(corpus, i, min(i + _BLOCK, corpus.documents))
        exact += np.bincount(np.minimum(lengths, _EXACT), minlength=_EXACT + 1)
        powers += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=65)[:65]
        shortest, longest, total = min(shortest, int(lengths.min())), max(longest, int(lengths.max())), total + int(lengths.sum())
    count = corpus.documents
    if not count:
        return Lengths(0, 0, 0, 0, 0.0, {}, ())
    below = np.cumsum(exact)
    percentiles: dict[int, int] = {}
    for p in (5, 25, 50, 75, 95, 99):
        at = int(np.searchsorted(below, math.ceil(count * p / 100)))
        percentiles[p] = at if at < _EXACT else longest
    used = np.flatnonzero(powers)
    bins = tuple((2 ** (e - 1) if e else 0, 2**e - 1, int(powers[e])) for e in range(int(used[0]), int(used[-1]) + 1))
    return Lengths(count, int(exact[0]), shortest, longest, total / count, percentiles, bins)


def _lengths(corpus: Indexed, begin: int, end: int) -> Tokens:
    ends = np.array(corpus.document_ends[begin : end + 1])
    if (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > corpus.sequences:
        raise UserError(f"{corpus.prefix}.idx is damaged: documents {begin} to {end} do not follow one another.")
    own = np.array(corpus.lengths[int(ends[0]) : int(ends[-1])], dtype=np.int64)
    if (own < 0).any():
        raise UserError(f"{corpus.prefix}.idx is damaged: a sequence of documents {begin} to {end} has a length below 0.")
    places = np.concatenate([[0], np.cumsum(own)])
    return np.diff(places[ends - ends[0]])


def bars(lengths: Lengths, width: int = 50) -> list[str]:
    """Draw the histogram as lines of text."""
    most = max((n for *_, n in lengths.bins), default=1) or 1
    label = max((len(f"{low:,} to {high:,}") for low, high, _ in lengths.bins), default=0)
    return [f"{f'{low:,} to {high:,}':>{label}} {'█' * round(n / most * width):<{width}} {n:,}" for low, high, n in lengths.bins]


def picture(lengths: Lengths, title: str) -> str:
    """Draw the histogram as an SVG picture."""
    most = max((n for *_, n in lengths.bins), default=1) or 1
    rows = [f'<text x="10" y="24" font-size="15">{_escape(title)}</text>']
    for i, (low, high, n) in enumerate(lengths.bins):
        y = 44 + 22 * i
        rows.append(f'<text x="190" y="{y + 13}" text-anchor="end">{low:,} to {high:,}</text>')
        rows.append(f'<rect x="200" y="{y}" width="{n / most * 420:.1f}" height="17" fill="#4878a8"/>')
        rows.append(f'<text x="{206 + n / most * 420:.1f}" y="{y + 13}">{n:,}</text>')
    size = f'width="740" height="{60 + 22 * len(lengths.bins)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *rows, "</svg>"]) + "\n"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
