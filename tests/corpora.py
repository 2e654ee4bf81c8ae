"""Small corpora for tests: in memory, or as .bin/.idx files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl.data.corpus import Part
from mtl.data.indexed import Indexed
from mtl.data.indexed_writer import IndexedWriter


def numbered(lengths: Sequence[int]) -> Part:
    """Make a corpus of these document lengths in memory; every token is the number of its place."""
    total = sum(lengths)
    ends = np.cumsum([0, *lengths])
    arrays: Any = (np.arange(total), np.array(lengths, np.int32), ends[:-1] * 8, np.arange(len(lengths) + 1))
    return Part(Indexed("memory", *arrays, None), 0, len(lengths))


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> str:
    """Write documents as prefix.bin and prefix.idx."""
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for tokens in documents:
        writer.add(np.array(tokens, np.int64), [len(tokens)], [1])
    writer.finish()
    return str(prefix)
