"""Packing against a slow best fit, its efficiency, and the samples made of packed chats."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.data.chat.corpus import Corpus
from mtl.data.chat.samples import Packed, Padded
from mtl.data.packing import best_fit, deal
from mtl.errors import UserError


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Give the rooms left over, one document at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=80))))
def test_packing_is_best_fit_of_the_longest_first(case: tuple[int, list[int]]) -> None:
    capacity, given_lengths = case
    lengths = np.array(given_lengths)
    packing = best_fit(lengths, capacity)
    documents = deal(lengths, packing.ranks, 5)
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    used = np.add.reduceat(lengths[documents], np.r_[0, packing.ends[:-1]])
    assert sorted((capacity - used).tolist()) == slow_best_fit(given_lengths, capacity)
    assert packing.efficiency == pytest.approx(lengths.sum() / (len(used) * capacity))
    assert packing.ends[-1] == len(lengths)


@pytest.mark.parametrize("capacity", [2048, 8192, 131072])
def test_packing_fills_98_percent_and_is_fast(capacity: int) -> None:
    draw = np.random.default_rng(0).lognormal(6.0, 1.2, 1_000_000)
    lengths = np.clip(draw.astype(np.int64), 1, capacity)
    start = time.perf_counter()
    packing = best_fit(lengths, capacity)
    assert time.perf_counter() - start < 30, "seconds on an idle machine; the bound is for a busy one"
    assert packing.efficiency >= 0.98
    few = best_fit(lengths[:2000], min(capacity, 8192) if lengths[:2000].max() <= 8192 else capacity)
    assert few.efficiency >= 0.98


def test_what_cannot_be_packed() -> None:
    for lengths in ([], [0, 3], [9]):
        with pytest.raises(UserError, match="packing takes documents of 1 to 8 tokens"):
            best_fit(np.array(lengths, dtype=np.int64), 8)


def corpus(lengths: list[int]) -> Corpus:
    """Make documents whose tokens say which they are; token t of document d is 100 d + t, of weight (t mod 3) / 2."""
    texts = [100 * d + np.arange(n + 1, dtype=np.int32) for d, n in enumerate(lengths)]
    weights = [(np.arange(n + 1) % 3 / 2).astype(np.float32) for n in lengths]
    return Corpus(np.concatenate(texts), np.concatenate(weights), np.cumsum([0, *(n + 1 for n in lengths)]))


LENGTHS = [3, 9, 4, 4, 2, 7, 1, 4, 3, 10]


def test_a_packed_sample() -> None:
    samples = Packed(corpus(LENGTHS), 10, 0, 77)
    assert len(samples) == 5
    for i in range(len(samples)):
        s = samples(i, 10)
        assert s.segments is not None
        place = 0
        for number, d in enumerate(samples.documents(i).tolist()):
            n = LENGTHS[d]
            here = slice(place, place + n)
            assert s.tokens[here].tolist() == [100 * d + t for t in range(n)]
            assert s.targets[here].tolist() == [100 * d + t + 1 for t in range(n)]
            assert s.weights[here].tolist() == [(t + 1) % 3 / 2 for t in range(n)]
            assert s.positions[here].tolist() == list(range(n))
            assert s.segments[here].tolist() == [number] * n
            place += n
        assert s.weights[place:].sum() == 0 and set(s.tokens[place:].tolist()) <= {77}
        assert set(s.segments[place:].tolist()) <= {len(samples.documents(i))}


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_every_epoch_has_every_document_once_and_mixes_anew(kind: str) -> None:
    lengths = np.random.default_rng(1).integers(1, 20, 300).tolist()

    def make(seed: int) -> Packed | Padded:
        return Packed(corpus(lengths), 32, seed, 0) if kind == "packed" else Padded(corpus(lengths), seed, 0)

    samples, again, other = make(3), make(3), make(4)
    count = len(samples)
    epochs = [[samples.documents(e * count + i).tolist() for i in range(count)] for e in range(3)]
    for epoch in epochs:
        assert sorted(d for documents in epoch for d in documents) == list(range(300))
    assert epochs[0] != epochs[1] != epochs[2]
    if kind == "packed":
        mixed = [{frozenset(documents) for documents in epoch} for epoch in epochs]
        assert len(mixed[0] & mixed[1]) < count / 2, "documents meet others in another epoch"
    assert again.documents(2 * count + 5).tolist() == epochs[2][5], "the same from anywhere, in any order of asking"
    assert [other.documents(i).tolist() for i in range(count)] != epochs[0]


def test_padding_to_the_longest_of_a_batch() -> None:
    samples = Padded(corpus(LENGTHS), 0, 77)
    for first in range(0, 40, 4):
        most = max(LENGTHS[samples.documents(i)[0]] for i in range(first, first + 4))
        assert samples.longest(first, 4, 1) == most
        assert samples.longest(first, 4, 8) == -(-most // 8) * 8
    s = samples(0, 12)
    assert s.segments is None and len(s.tokens) == 12
    assert s.weights[LENGTHS[samples.documents(0)[0]] :].sum() == 0


def test_held_out_samples_keep_their_order() -> None:
    packed = Packed(corpus(LENGTHS), 10, 5, 0, shuffle=False)
    assert [packed.documents(i).tolist() for i in range(5)] == [packed.documents(i + 5).tolist() for i in range(5)]
    assert [Padded(corpus(LENGTHS), 5, 0, False).documents(i)[0] for i in range(12)] == [*range(10), 0, 1]
