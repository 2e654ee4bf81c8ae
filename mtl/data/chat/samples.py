"""Samples of a chat corpus: packed sequences, or one conversation each. Sample i depends on (seed, i) and the settings alone."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mtl import random
from mtl.data.chat.corpus import Corpus
from mtl.data.packing import Ints, Packing, best_fit, deal
from mtl.data.samples import Sample


@dataclass(frozen=True, eq=False)
class Packed:
    """Conversations packed by best fit and kept apart. An epoch has every conversation once, in an order and a mixture of its own.

    Without ``shuffle`` every epoch is the same, in the packing's order.
    """

    corpus: Corpus
    seq_len: int
    seed: int
    pad: int
    shuffle: bool = True

    @cached_property
    def packing(self) -> Packing:
        """Say which lengths share a sequence, the same in every epoch."""
        return best_fit(self.corpus.lengths, self.seq_len)

    def __len__(self) -> int:
        """Count the sequences of an epoch."""
        return len(self.packing.ends)

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give one sequence."""
        return join(self.corpus, self.documents(index), seq_len, self.pad)

    def documents(self, index: int) -> Ints:
        """Name the documents of one sequence."""
        epoch, place = divmod(index, len(self))
        if self.shuffle:
            place = random.permute(random.key(self.seed, "sequences", epoch), place, len(self))
        first = self.packing.ends[place - 1] if place else 0
        return _dealt(self, epoch if self.shuffle else 0)[first : self.packing.ends[place]]


@lru_cache(maxsize=4)
def _dealt(samples: Packed, epoch: int) -> Ints:
    return deal(samples.corpus.lengths, samples.packing.ranks, random.key(samples.seed, "documents", epoch))


@dataclass(frozen=True)
class Padded:
    """One conversation a sample, padded. An epoch has every conversation once."""

    corpus: Corpus
    seed: int
    pad: int
    shuffle: bool = True

    def __len__(self) -> int:
        """Count the samples of an epoch."""
        return len(self.corpus.lengths)

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give one sample."""
        return join(self.corpus, self.documents(index), seq_len, self.pad)._replace(segments=None)

    def documents(self, index: int) -> Ints:
        """Name the one document of a sample."""
        epoch, place = divmod(index, len(self))
        if self.shuffle:
            place = random.permute(random.key(self.seed, "samples", epoch), place, len(self))
        return np.array([place])

    def longest(self, first: int, count: int, multiple: int) -> int:
        """Give the length that samples from ``first`` on need: the longest of them, rounded up to a multiple."""
        most = max(int(self.corpus.lengths[self.documents(i)[0]]) for i in range(first, first + count))
        return -(-most // multiple) * multiple


def join(corpus: Corpus, documents: Ints, seq_len: int, pad: int) -> Sample:
    """Lay documents one after the other, each with positions from 0 and a number of its own; padding after them counts for nothing."""
    tokens, targets = np.full(seq_len, pad, dtype=np.int64), np.full(seq_len, pad, dtype=np.int64)
    weights, positions, segments = np.zeros(seq_len), np.arange(seq_len), np.full(seq_len, len(documents), dtype=np.int64)
    start = 0
    for number, document in enumerate(documents.tolist()):
        text, counted = corpus.document(document)
        here = slice(start, start + len(text) - 1)
        tokens[here], targets[here], weights[here] = text[:-1], text[1:], counted[1:]
        positions[here], segments[here] = np.arange(len(text) - 1), number
        start = here.stop
    positions[start:] -= start
    return Sample(tokens, targets, weights, positions, segments)
