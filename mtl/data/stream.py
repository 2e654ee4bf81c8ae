"""The stateless order: sample i of a corpus from (seed, i) alone, documents whole and shuffled, nothing built beforehand.

Think of epoch e as all tokens in an order of its own, and of the epochs as one endless line of tokens. Sample v of the line holds tokens
v S to v S + S (one more, as the last target), so an epoch of T tokens begins inside a sample, and every token of it comes exactly once.

Documents stay near their place in the file: cut the file's tokens into stretches of NEIGHBOURS samples, give each stretch the documents
that start in it, and shuffle those by a keyed hash. A stretch keeps its place, so what stands at a place of the line is found by bisection
in the .idx file and a sort of some hundred numbers. The samples of an epoch are then visited in a keyed permutation of their numbers; the
one that reaches into the next epoch is the last. See docs/decisions/0004-order-without-an-index.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mtl import random
from mtl.data.corpus import Corpus
from mtl.data.fill_middle import FillMiddle, fill_middle
from mtl.data.indexed import check_ids
from mtl.data.samples import JOINED, Documents, Sample, Tokens, as_sample

NEIGHBOURS = 64


class Piece(NamedTuple):
    """Tokens ``first`` to ``stop`` of a document."""

    document: int
    first: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """What is done with the tokens of a sample, whatever the order."""

    documents: Documents = JOINED
    fill_middle: FillMiddle | None = None
    vocab: int | None = None
    """Ids from here on are refused."""


class Stream:
    """One corpus's endless line of samples."""

    def __init__(self, corpus: Corpus, key: int, name: str, reading: Reading = Reading()) -> None:
        """Take a corpus with at least one token; ``key`` decides the order, ``name`` is for messages."""
        self.corpus, self.key, self.name, self.reading = corpus, key, name, reading
        self.size = corpus.size

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give one sample."""
        return read_sample(self.corpus, self.pieces(index, seq_len), self.name, self.reading, random.key(self.key, "sample", index))

    def pieces(self, index: int, seq_len: int) -> list[Piece]:
        """Say what sample ``index`` is made of: seq_len + 1 tokens."""
        epoch, place = divmod(self.visited(index, seq_len) * seq_len, self.size)
        found: list[Piece] = []
        missing = seq_len + 1
        while missing:
            for piece in self._line(epoch, place, seq_len):
                stop = min(piece.stop, piece.first + missing)
                found.append(piece._replace(stop=stop))
                missing -= stop - piece.first
                if not missing:
                    break
            epoch, place = epoch + 1, 0
        return found

    def visited(self, index: int, seq_len: int) -> int:
        """Say which sample of the line is the ``index``-th to be visited."""
        epoch = self.epoch(index, seq_len)
        first, stop = -(-epoch * self.size // seq_len), -(-(epoch + 1) * self.size // seq_len)
        inside = stop - first - (stop * seq_len > (epoch + 1) * self.size)  # the one that reaches into the next epoch comes last
        if index - first >= inside:
            return index
        return first + random.permute(random.key(self.key, "samples", epoch), index - first, inside)

    def epoch(self, index: int, seq_len: int) -> int:
        """Say in which epoch a sample begins."""
        return index * seq_len // self.size

    def _line(self, epoch: int, place: int, seq_len: int) -> Iterator[Piece]:
        """Give the documents of an epoch from a place of its line on."""
        corpus, width = self.corpus, NEIGHBOURS * seq_len
        while place < self.size:
            here = corpus.holding(place)
            stretch = corpus.start(here) // width
            first, stop = (self._first_from(edge * width, here) for edge in (stretch, stretch + 1))
            key = random.key(self.key, "documents", epoch, stretch)
            order = random.bits(key, torch.arange(first, stop)).argsort(stable=True).numpy()
            lengths = corpus.lengths(first, stop)[order]
            begin, end = corpus.start(first), corpus.start(stop)
            ends = begin + lengths.cumsum()
            for i in range(int(np.searchsorted(ends, place, side="right")), len(order)):
                if lengths[i]:
                    stood = int(ends[i] - lengths[i])
                    yield Piece(first + int(order[i]), max(place - stood, 0), int(lengths[i]))
            place = end

    def _first_from(self, place: int, near: int) -> int:
        """Find the first document, of those with tokens, that starts at a place or after it; ``near`` is a document close by."""
        if place >= self.size:
            return self.corpus.documents
        found = self.corpus.holding(place, near)
        return found if self.corpus.start(found) == place else found + 1


def read_sample(corpus: Corpus, pieces: list[Piece], name: str, reading: Reading, key: int) -> Sample:
    """Read pieces of documents as one sample; ``key`` decides what is random in it."""
    parts: list[Tokens] = [corpus.read(p.document, p.first, p.stop) for p in pieces]
    text = np.concatenate(parts).astype(np.int64)
    if int(text.min()) < 0 or (reading.vocab is not None and int(text.max()) >= reading.vocab):
        for piece, ids in zip(pieces, parts, strict=True):
            check_ids(ids, reading.vocab, f"{name}, document {piece.document}", piece.first)
    begins = np.cumsum([len(p) for p in parts[:-1]], dtype=np.int64)
    if (how := reading.fill_middle) is not None:
        pieces_of_text = np.split(text, begins)
        text = np.concatenate([fill_middle(t, how, reading.documents.end, key, i) for i, t in enumerate(pieces_of_text)])
    return as_sample(text, reading.documents, begins)
