"""Samples in Megatron-LM's order: one corpus, or a blend built as its builder builds it."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mtl import random
from mtl.data import megatron
from mtl.data.corpus import Corpus, Part
from mtl.data.mapped import in_turn
from mtl.data.samples import Sample, Samples
from mtl.data.stream import Piece, Reading, read_sample
from mtl.errors import UserError


class Built(NamedTuple):
    """The indices of a run: of its blend, where it is one, and of each corpus."""

    blend: megatron.BlendIndices | None
    parts: list[tuple[Part, megatron.Indices]]

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self.parts[0][1].shuffle_index) if self.blend is None else len(self.blend.dataset_index)

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Give every index but the blend's, whose choices do not depend on how many there are."""
        return [array for _, found in self.parts for array in found]


class MegatronSamples:
    """Samples of built indices, for the sequence length that they were built for."""

    def __init__(self, built: Built, names: Sequence[str], seq_len: int, seed: int, reading: Reading) -> None:
        """Take the indices; ``names`` are for messages, ``seed`` decides what is random inside a sample."""
        self.built, self.names, self.seq_len, self.seed, self.reading = built, names, seq_len, seed, reading

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give one sample; behind the last comes the first."""
        if seq_len != self.seq_len:
            raise UserError(f"Megatron's order was built for sequences of {self.seq_len} tokens, not {seq_len}.")
        index %= self.built.size
        k, number = (0, index)
        if self.built.blend is not None:
            k, number = (int(x[index]) for x in self.built.blend)
        corpus, found = self.built.parts[k]
        whole = Part(corpus.of, 0, corpus.of.sequences)
        key = random.key("data", self.seed, "megatron", index)
        return read_sample(whole, pieces(whole, found, number), self.names[k], self.reading, key)


def pieces(corpus: Corpus, found: megatron.Indices, sample: int) -> list[Piece]:
    """Say what a sample is made of, its last target included."""
    (i, first), (j, last) = found.bounds(sample)
    documents = found.document_index[i : j + 1].tolist()
    stops = [*corpus_lengths(corpus, documents[:-1]), last + 1]
    firsts = [first] + [0] * (len(documents) - 1)
    return [Piece(d, a, b) for d, a, b in zip(documents, firsts, stops, strict=True) if a < b]


def corpus_lengths(corpus: Corpus, documents: Sequence[int]) -> list[int]:
    """Give the lengths of some documents."""
    return [int(corpus.lengths(d, d + 1)[0]) for d in documents]


def build(parts: Sequence[tuple[str, Corpus, Fraction | None]], seq_len: int, samples: int | None, seed: int) -> Built:
    """Build what Megatron-LM's builder builds: for one corpus without weight, a weighted blend, or corpora each seen once."""
    corpora = [_part(name, corpus) for name, corpus, _ in parts]
    weights = [w for _, _, w in parts if w is not None]
    if not weights and len(parts) == 1:
        return Built(None, [(corpora[0], _indices(parts[0][0], corpora[0], seq_len, samples, seed))])
    if weights:
        if samples is None:
            raise UserError("Megatron's order with weights needs a number of samples.")
        once = megatron.normalize([float(w) for w in weights])
        targets, built = megatron.blend_targets(once, samples)
        found = [_indices(name, c, seq_len, n, seed) for (name, *_), c, n in zip(parts, corpora, built, strict=True)]
        blend = megatron.weighted(once, sum(targets))
        _check_oversampling(blend, found, [name for name, *_ in parts])
        return Built(blend, list(zip(corpora, found, strict=True)))
    found = [_indices(name, c, seq_len, None, seed) for (name, *_), c in zip(parts, corpora, strict=True)]
    sizes = [len(x.shuffle_index) for x in found]
    if samples is None:
        return Built(megatron.exhaustive(sizes), list(zip(corpora, found, strict=True)))
    blend = megatron.weighted([float(n) for n in sizes], min(samples, sum(sizes)))
    return Built(blend, list(zip(corpora, found, strict=True)))


def megatron_samples(
    parts: Sequence[tuple[str, Corpus, Fraction | None]], seq_len: int, samples: int, seed: int, reading: Reading
) -> Samples:
    """Make the samples of a run of ``samples`` samples."""
    built = build(parts, seq_len, samples, seed)
    if built.size < samples:
        raise UserError(
            f"--data.order megatron: corpora without weights are seen once, which gives {built.size} samples of {seq_len} tokens, "
            f"but the run takes {samples}. Give weights, or fewer --train.steps."
        )
    return MegatronSamples(built, [name for name, *_ in parts], seq_len, seed, reading)


def _indices(name: str, corpus: Part, seq_len: int, samples: int | None, seed: int) -> megatron.Indices:
    in_turn(corpus.of.lengths)  # all of them are read, unlike by the stateless order
    lengths: Any = np.asarray(corpus.of.lengths)
    documents = np.arange(corpus.first, corpus.stop, dtype=np.int32)
    if corpus.size <= seq_len and samples is None:
        raise UserError(f"corpus {name} has {corpus.size} tokens in this split: too few for one sequence of {seq_len}.")
    return megatron.indices(lengths, documents, seq_len, samples, seed)


def _check_oversampling(blend: megatron.BlendIndices, found: Sequence[megatron.Indices], names: Sequence[str]) -> None:
    """Refuse a blend that asks a corpus for more than the 0.5 % that Megatron-LM builds beyond its share, as its builder does."""
    asked = np.bincount(blend.dataset_index, minlength=len(found))
    for name, n, indices in zip(names, asked.tolist(), found, strict=True):
        if n > len(indices.shuffle_index):
            raise UserError(
                f"--data.order megatron: the blend takes {n} samples of corpus {name}, but Megatron-LM's order builds "
                f"{len(indices.shuffle_index)} of it. Take more samples, or fewer corpora of small weight."
            )


def _part(name: str, corpus: Corpus) -> Part:
    if not isinstance(corpus, Part):
        raise UserError(f"--data.order megatron reads .bin/.idx corpora alone: {name} is a plain array of tokens.")
    return corpus
