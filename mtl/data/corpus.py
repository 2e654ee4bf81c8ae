"""What an order reads: documents of tokens that stand one after another, of one file or several, and never all of them at once."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtl.data.indexed import Indexed, idx_path, open_indexed
from mtl.data.mapped import at_random
from mtl.data.shards import map_tokens
from mtl.errors import UserError

Array = npt.NDArray[Any]


class Corpus(Protocol):
    """Documents 0, 1, ... and the places 0, 1, ... of their tokens; each call touches a few pages of the files."""

    @property
    def size(self) -> int:
        """How many tokens there are."""
        ...

    @property
    def documents(self) -> int:
        """How many documents there are."""
        ...

    def start(self, document: int) -> int:
        """Give the place of a document's first token; of the number of documents, the number of tokens."""
        ...

    def holding(self, place: int, near: int | None = None) -> int:
        """Find the document that holds the token at a place; ``near`` may name a document not far from it, which saves reading."""
        ...

    def lengths(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Give the lengths of some documents."""
        ...

    def read(self, document: int, first: int, stop: int) -> Array:
        """Give some tokens of a document."""
        ...


@dataclass(frozen=True)
class Part:
    """Sequences ``first`` to ``stop`` of a .bin/.idx corpus; like Megatron-LM's, an order's documents are its sequences."""

    of: Indexed
    first: int
    stop: int

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self.of.start(self.stop) - self.of.start(self.first)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.stop - self.first

    def start(self, document: int) -> int:
        """Give the place of a document's first token."""
        return self.of.start(self.first + document) - self.of.start(self.first)

    def holding(self, place: int, near: int | None = None) -> int:
        """Find the document that holds the token at a place, by bisection in the file."""
        return self.of.holding(place + self.of.start(self.first), None if near is None else self.first + near) - self.first

    def lengths(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Give the lengths of some documents."""
        return self.of.lengths[self.first + first : self.first + stop].astype(np.int64)

    def read(self, document: int, first: int, stop: int) -> Array:
        """Give some tokens of a document."""
        return self.of.sequence(self.first + document, first, stop)


@dataclass(frozen=True)
class Shard:
    """A plain array of tokens, whose documents are known by their end-of-document ids alone: to an order it is one document."""

    tokens: Array
    documents: int = 1

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    def start(self, document: int) -> int:
        """Give 0, or behind the one document the number of tokens."""
        return document * self.size

    def holding(self, place: int, near: int | None = None) -> int:
        """Find the document that holds the token at a place."""
        return 0

    def lengths(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Give the lengths of some documents."""
        return np.array([self.size] * (stop - first), np.int64)

    def read(self, document: int, first: int, stop: int) -> Array:
        """Give some tokens."""
        return self.tokens[first:stop]


class Joined:
    """Several corpora as one, so that every document of all of them comes once before any comes twice."""

    def __init__(self, parts: Sequence[Corpus]) -> None:
        """Take the corpora in order."""
        self.parts = tuple(parts)
        self._tokens = [0, *accumulate(p.size for p in parts)]
        self._documents = [0, *accumulate(p.documents for p in parts)]
        self.size, self.documents = self._tokens[-1], self._documents[-1]

    def start(self, document: int) -> int:
        """Give the place of a document's first token."""
        if document == self.documents:
            return self.size
        k = bisect_right(self._documents, document) - 1
        return self._tokens[k] + self.parts[k].start(document - self._documents[k])

    def holding(self, place: int, near: int | None = None) -> int:
        """Find the document that holds the token at a place."""
        k = bisect_right(self._tokens, place) - 1
        near = None if near is None else min(max(near - self._documents[k], 0), self.parts[k].documents)
        return self._documents[k] + self.parts[k].holding(place - self._tokens[k], near)

    def lengths(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Give the lengths of some documents."""
        inside = [
            p.lengths(max(first - at, 0), min(stop - at, p.documents))
            for p, at in zip(self.parts, self._documents, strict=False)
            if at < stop and at + p.documents > first
        ]
        return np.concatenate(inside) if inside else np.zeros(0, np.int64)

    def read(self, document: int, first: int, stop: int) -> Array:
        """Give some tokens of a document."""
        k = bisect_right(self._documents, document) - 1
        return self.parts[k].read(document - self._documents[k], first, stop)


SPLITS = ("train", "valid", "test")


def split_bounds(split: str) -> list[tuple[float, float] | None]:
    """Read a split such as ``969,30,1``: where train, valid and test begin and end, as shares; None for a split of nothing."""
    if not re.fullmatch(r"\s*[0-9.]+(\s*[,/ ]\s*[0-9.]+){0,2}\s*", split):
        raise UserError(f"--data.split is {split!r}: expected up to three shares of train, valid and test, such as 969,30,1.")
    try:
        shares = [float(x) for x in re.findall(r"[.0-9]+", split)]
    except ValueError:
        raise UserError(f"--data.split is {split!r}: its shares must be numbers, such as 969,30,1.") from None
    weights = np.array(shares + [0.0] * (3 - len(shares)))
    if weights.sum() <= 0:
        raise UserError(f"--data.split is {split!r}: one share at least must be above 0.")
    weights = weights / weights.sum()
    edges = [0.0]
    for w in weights.tolist():
        edges.append(edges[-1] + w)
    return [(a, b) if b > a else None for a, b in pairwise(edges)]


def share(count: int, bounds: tuple[float, float] | None) -> tuple[int, int]:
    """Give the first and last + 1 of ``count`` things that a split holds, rounded as Megatron-LM rounds (half to even)."""
    return (0, 0) if bounds is None else (round(bounds[0] * float(count)), round(bounds[1] * float(count)))


def open_corpus(path: str, bounds: tuple[float, float] | None = (0.0, 1.0), dtype: str | None = None, skip_bytes: int = 0) -> Corpus:
    """Open one split of a corpus: of the prefix of a .bin/.idx pair, a .npy file, or with ``dtype`` a plain .bin file.

    A pair is split by documents, a plain array by tokens. ``skip_bytes`` leaves out a plain .bin's header.
    """
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    if idx_path(prefix).exists() or (dtype is None and not path.endswith((".npy", ".bin"))):
        whole = open_indexed(prefix)
        if whole.dtype.kind not in "iu":
            raise UserError(f"{idx_path(prefix)} holds elements of type {whole.dtype.name}: tokens must be whole numbers.")
        for array in (whole.pointers, whole.tokens):
            at_random(array)
        return Part(whole, *share(whole.sequences, bounds))
    tokens = map_tokens(path if path.endswith((".npy", ".bin")) else f"{path}.bin", dtype, skip_bytes)
    at_random(tokens)
    first, stop = share(len(tokens), bounds)
    return Shard(tokens[first:stop])
