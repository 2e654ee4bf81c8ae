"""Fill-in-the-middle (Bavarian and others 2022) on tokens: a document becomes prefix, suffix, middle, and its length stays."""

from dataclasses import dataclass

import numpy as np

from mtl import random
from mtl.data.samples import Tokens

SHORTEST = 8
"""Documents with fewer tokens stay as they are."""


@dataclass(frozen=True)
class FillMiddle:
    """How often, in which form, and by which ids."""

    rate: float
    """The share of documents that are turned."""
    spm_rate: float
    """The share of these that have the suffix first."""
    prefix: int
    middle: int
    suffix: int


def fill_middle(text: Tokens, how: FillMiddle, end: int | None, key: int, number: int) -> Tokens:
    """Turn a document, the ``number``-th of its sample, or leave it; the same for the same key.

    It is cut at two places. Three ids are added, so the suffix loses its last three tokens (or what it has; then the middle too); an
    end-of-document id stays last.
    """
    closed = len(text) > 0 and end is not None and text[-1] == end
    body = text[:-1] if closed else text
    draw = random.key(key, "fill-middle", number)
    if len(body) < SHORTEST or _share(draw, 0) >= how.rate:
        return text
    kept = len(body) - 3
    first, last = sorted(int(_share(draw, i) * (len(body) + 1)) for i in (1, 2))
    first, last = min(first, kept), min(last, kept)
    prefix, middle, suffix = body[:first], body[first:last], body[last:kept]
    if _share(draw, 3) < how.spm_rate:
        order = ([how.prefix, how.suffix], suffix, [how.middle], prefix, middle)
    else:
        order = ([how.prefix], prefix, [how.suffix], suffix, [how.middle], middle)
    return np.concatenate([np.asarray(x, np.int64) for x in (*order, text[len(body) :])])


def _share(key: int, i: int) -> float:
    """Draw a number in [0, 1)."""
    return (random.key(key, i) >> 11 & (1 << 52) - 1) / (1 << 52)
