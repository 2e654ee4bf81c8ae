"""Megatron-LM's sample order bit for bit: split, document, sample, shuffle and blend indices from arrays of document lengths.

Kept for runs that must read what Megatron-LM reads. It has that program's traits: the order depends on the run's length, every corpus of a
blend has the same seed, and building takes time and memory in proportion to the data.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]

SURPLUS = 0.005
"""A blend builds so many more samples of each corpus than it means to take."""


class Indices(NamedTuple):
    """The three arrays of one corpus and split: documents in order, where samples begin in them, and the samples' order."""

    document_index: Ints
    sample_index: Ints
    shuffle_index: Ints

    def bounds(self, sample: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Give where sample ``sample`` begins and where the next one in line begins: (place in document_index, offset) each."""
        row = int(self.shuffle_index[sample])
        (i, first), (j, last) = self.sample_index[row].tolist(), self.sample_index[row + 1].tolist()
        return (i, first), (j, last)


class BlendIndices(NamedTuple):
    """For every sample of a blend: which corpus, and which of the corpus's samples."""

    dataset_index: npt.NDArray[np.int16]
    dataset_sample_index: npt.NDArray[np.int64]


def indices(
    lengths: Ints, documents: Ints, seq_len: int, samples: int | None, seed: int, extra: int = 1, drop_last: bool = True
) -> Indices:
    """Build the indices of ``documents`` (int32 numbers into ``lengths``) for ``samples`` samples, or one epoch where that is None.

    ``extra`` is 1 where a sample has a target beyond its last token.
    """
    per_epoch = int(lengths[documents].sum(dtype=np.int64))
    epochs = 1
    if samples is not None and per_epoch > 0:
        epochs = max(1, -(-(samples * seq_len + extra) // per_epoch))
    apart, before_last = False, 0
    if epochs > 1 and samples is not None:
        before_last = ((epochs - 1) * per_epoch - extra) // seq_len
        apart = samples - before_last < int(0.80 * ((per_epoch - extra) // seq_len))
    rng = np.random.RandomState(seed)  # one stream for everything below, in this order
    document_index = np.tile(documents.astype(np.int32), epochs - 1 if apart else epochs)
    rng.shuffle(document_index)
    if apart:
        last = documents.astype(np.int32)
        rng.shuffle(last)
        document_index = np.concatenate([document_index, last])
    tokens = epochs * per_epoch - extra
    # Their builder rounds the last part in float32, which differs from exact arithmetic in large corpora.
    count = tokens // seq_len if drop_last else math.ceil(np.float32(tokens) / np.float32(seq_len))
    sample_index = boundaries(lengths, document_index, seq_len, count, extra)
    middle = before_last if apart else count
    kind = np.uint32 if count < 2**32 - 2 else np.int64
    shuffle_index = np.arange(middle, dtype=kind)
    rng.shuffle(shuffle_index)
    if middle != count:
        rest = np.arange(middle, count, dtype=kind)
        rng.shuffle(rest)
        shuffle_index = np.concatenate([shuffle_index, rest])
    return Indices(document_index, sample_index, shuffle_index)


def boundaries(lengths: Ints, document_index: Ints, seq_len: int, count: int, extra: int) -> Ints:
    """Find where every sample begins, [count + 1, 2] of (place in document_index, offset); ``extra`` tokens are shared with the next."""
    sizes = lengths[document_index].astype(np.int64)
    ends = sizes.cumsum()
    targets = np.arange(count + 1, dtype=np.int64) * seq_len + extra - 1  # the last token of the sample before
    targets = np.minimum(targets, ends[-1] - 1)  # a sample that the data does not fill ends where the data ends
    place = np.searchsorted(ends, targets, side="right")
    offset = targets - (ends[place] - sizes[place]) + 1 - extra
    place[0] = offset[0] = 0
    if count and (count * seq_len + extra) > ends[-1]:  # their loop then stops in the last document, be it empty or not
        place[-1], offset[-1] = len(sizes) - 1, sizes[-1] - extra
    wide = max(len(document_index), int(lengths.max())) > 2**31 - 1
    return np.stack([place, offset], 1).astype(np.int64 if wide else np.int32)


def normalize(weights: Sequence[float]) -> list[float]:
    """Divide weights by their sum, in numpy's float64 order of addition."""
    array = np.array(weights, dtype=np.float64)
    return (array / np.sum(array)).tolist()


def blend_targets(weights: Sequence[float], size: int) -> tuple[list[int], list[int]]:
    """Give how many samples a blend of ``size`` takes of each corpus, and how many it builds; weights are normalised once before."""
    targets = [math.ceil(size * w) for w in weights]
    return targets, [math.ceil(t * (1 + SURPLUS)) for t in targets]


def weighted(weights: Sequence[float], size: int) -> BlendIndices:
    """Choose for each of ``size`` samples the corpus that lacks most; ``weights`` are normalised here (a blend's were once before, too).

    Each product and difference is rounded by itself, as on x86-64 (compilers for other machines may fuse them, and then near-ties differ).
    """
    w = np.array(normalize(weights))
    counts = np.zeros(len(w))
    which, number = np.empty(size, np.int16), np.empty(size, np.int64)
    for s in range(size):
        k = int(np.argmax(w * max(float(s), 1.0) - counts))
        which[s], number[s] = k, counts[k]
        counts[k] += 1.0
    return BlendIndices(which, number)


def exhaustive(sizes: Sequence[int]) -> BlendIndices:
    """Use up corpora of these many samples, each in proportion to its size."""
    total = sum(sizes)
    w = np.array([size / total for size in sizes])
    counts, left = np.zeros(len(sizes)), np.array(sizes) > 0
    which, number = np.empty(total, np.int16), np.empty(total, np.int64)
    for s in range(total):
        k = int(np.argmax(np.where(left, w * max(float(s), 1.0) - counts, -np.inf)))
        which[s], number[s] = k, counts[k]
        counts[k] += 1.0
        left[k] = counts[k] < sizes[k]
    return BlendIndices(which, number)
