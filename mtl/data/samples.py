"""Samples as pure functions of an index: what every source of data gives, and how a text with documents becomes one.

Whatever gives samples (a corpus, a blend, packed chats) is a function from (index, seq_len) to a ``Sample``; ``batches`` needs no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mtl import random
from mtl.errors import UserError

Tokens = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


class Sample(NamedTuple):
    """One sequence, arrays of [S]: token s is to predict target s, which counts for its weight.

    ``segments`` number the documents that attention keeps apart; None where a token sees all before it. Either all samples of a
    source have them or none.
    """

    tokens: Tokens
    targets: Tokens
    weights: Weights
    positions: Tokens
    segments: Tokens | None = None


class Samples(Protocol):
    """Anything that gives sample ``index`` at ``seq_len`` tokens, the same one whenever and wherever it is asked."""

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give one sample."""
        ...


@dataclass(frozen=True)
class Documents:
    """How documents that share a sequence are treated."""

    apart: bool = False
    """Attention stays within a document."""
    reset_positions: bool = False
    """Positions count from 0 in every document."""
    mask_ends: bool = False
    """The last token of a document predicts nothing (its target is the next document's first)."""
    end: int | None = None
    """The end-of-document id: a document ends after it, even where the source does not know of documents."""


JOINED = Documents()


def as_sample(text: Tokens, documents: Documents = JOINED, begins: Sequence[int] | Tokens = ()) -> Sample:
    """Make a sample from S + 1 tokens. ``begins`` are the places in the text at which documents begin, where they are known."""
    count = len(text) - 1
    tokens, targets, weights, places = text[:-1], text[1:], np.ones(count), np.arange(count)
    if not (documents.apart or documents.reset_positions or documents.mask_ends):
        return Sample(tokens, targets, weights, places)
    first = np.zeros(count + 1, dtype=bool)  # does a document begin here?
    first[np.asarray(begins, dtype=np.int64)] = True
    if documents.end is not None:
        first[1:] |= tokens == documents.end
    if documents.mask_ends:
        weights[first[1:]] = 0.0
    first[0] = False
    if documents.reset_positions:
        places = places - np.maximum.accumulate(np.where(first[:-1], places, 0))
    return Sample(tokens, targets, weights, places, first[:-1].cumsum() if documents.apart else None)


class Windows:
    """Windows of a long text, drawn without order: one epoch visits every window once, in a keyed permutation."""

    def __init__(self, text: npt.NDArray[np.uint8], seed: int, name: str) -> None:
        """Take the text, and what decides the order."""
        self.text, self.seed, self.name = text, seed, name

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give sample ``index``. Every epoch shifts the windows' borders by an amount of its own."""
        length = seq_len + 1
        count = len(self.text) // length - 1
        if count < 1:
            raise UserError(f"the {self.name} text has {len(self.text)} tokens: too few for sequences of {seq_len}; lower --train.seq-len.")
        epoch, place = divmod(index, count)
        key = random.key(self.seed, self.name, epoch)
        start = random.permute(key, place, count) * length + key % length
        return as_sample(self.text[start : start + length].astype(np.int64))
