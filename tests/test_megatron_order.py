"""Megatron-LM's order: its known answers, and 200 random cases against a slow implementation of its description."""

import math
import random
import struct
from typing import Any

import numpy as np
import pytest

from mtl.data import megatron

# ---------------------------------------------------------------- the slow one: plain integers, no numpy randomness


class Twister:
    """MT19937 seeded by Knuth's recurrence, and numpy's legacy shuffle."""

    def __init__(self, seed: int) -> None:
        self.state = [seed & 0xFFFFFFFF]
        for i in range(1, 624):
            last = self.state[-1]
            self.state.append((1812433253 * (last ^ (last >> 30)) + i) & 0xFFFFFFFF)
        self.place = 624

    def draw(self) -> int:
        if self.place == 624:
            s = self.state
            for i in range(624):
                y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7FFFFFFF)
                s[i] = s[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)
            self.place = 0
        y = self.state[self.place]
        self.place += 1
        y ^= y >> 11
        y ^= (y << 7) & 0x9D2C5680
        y ^= (y << 15) & 0xEFC60000
        return y ^ (y >> 18)

    def interval(self, most: int) -> int:
        mask = (1 << most.bit_length()) - 1
        while True:
            value = self.draw() & mask
            if value <= most:
                return value

    def shuffle(self, x: list[int]) -> None:
        for i in range(len(x) - 1, 0, -1):
            j = self.interval(i)
            x[i], x[j] = x[j], x[i]


def single(x: float) -> float:
    """Round to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def slow(
    lengths: list[int], docs: list[int], s: int, n: int | None, seed: int, e: int, drop_last: bool
) -> tuple[list[int], list[list[int]], list[int]]:
    total = sum(lengths[d] for d in docs)
    epochs = 1
    if n is not None:
        while epochs * total < n * s + e:
            epochs += 1
    sep, sans = False, 0
    if epochs > 1:
        assert n is not None
        sans = ((epochs - 1) * total - e) // s
        sep = n - sans < int(0.80 * ((total - e) // s))
    rng = Twister(seed)
    d = list(docs) * (epochs - 1 if sep else epochs)
    rng.shuffle(d)
    if sep:
        last = list(docs)
        rng.shuffle(last)
        d += last
    tokens = epochs * total - e
    count = tokens // s if drop_last else math.ceil(single(single(tokens) / single(s)))
    sample = [[0, 0]]
    i = off = 0
    for _ in range(count):
        rem = s + e
        while rem != 0:
            length = lengths[d[i]] - off
            rem -= length
            if rem <= 0:
                off += rem + length - e
                rem = 0
            elif i == len(d) - 1:
                off = lengths[d[i]] - e
                break
            else:
                i, off = i + 1, 0
        sample.append([i, off])
    m = sans if sep else count
    shuffled, rest = list(range(m)), list(range(m, count))
    rng.shuffle(shuffled)
    if m != count:
        rng.shuffle(rest)
    return d, sample, shuffled + rest


def lists(found: megatron.Indices) -> tuple[list[Any], ...]:
    return tuple(x.tolist() for x in found)


# ---------------------------------------------------------------- known answers

LENGTHS = [5, 3, 7, 2, 6, 4, 9, 1]
KNOWN = {
    6: (
        "2 1 5 0 4 3",
        "(0,0)(0,4)(1,1)(2,2)(3,2)(4,1)(4,5)",
        "0 4 3 2 5 1",
    ),
    9: (
        "2 1 5 0 4 3 0 4 3 2 5 1",
        "(0,0)(0,4)(1,1)(2,2)(3,2)(4,1)(4,5)(6,1)(7,0)(7,4)(9,0)(9,4)(10,1)(11,1)",
        "1 0 3 2 5 4 8 9 11 7 10 12 6",
    ),
    20: ("5 3 5 4 1 2 0 2 4 1 1 3 2 4 0 5 0 3", None, "8 19 13 1 4 17 14 11 9 0 7 3 10 6 2 5 12 16 18 15"),
}


@pytest.mark.parametrize("n", KNOWN)
def test_known_indices(n: int) -> None:
    found = megatron.indices(np.array(LENGTHS, np.int32), np.arange(6, dtype=np.int32), 4, n, 1234)
    document, sample, shuffle = KNOWN[n]
    assert found.document_index.tolist() == [int(x) for x in document.split()]
    assert found.shuffle_index.tolist() == [int(x) for x in shuffle.split()]
    if sample is not None:
        assert found.sample_index.tolist() == [[int(x) for x in pair.split(",")] for pair in sample[1:-1].split(")(")]
    assert (found.document_index.dtype, found.sample_index.dtype, found.shuffle_index.dtype) == (np.int32, np.int32, np.uint32)


def test_known_shuffle() -> None:
    x = list(range(10))
    Twister(1234).shuffle(x)
    assert x == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]


def test_known_blends() -> None:
    assert megatron.weighted(megatron.normalize([30, 70]), 12).dataset_index.tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
    found = megatron.exhaustive([3, 2, 5])
    assert found.dataset_index.tolist() == [2, 0, 1, 2, 0, 2, 1, 2, 0, 2]
    assert (found.dataset_index.dtype, found.dataset_sample_index.dtype) == (np.int16, np.int64)


# ---------------------------------------------------------------- random cases


def test_200_random_index_cases() -> None:
    rng = random.Random(5)
    kinds = set[str]()
    for case in range(200):
        count = rng.randint(1, 40)
        lengths = [rng.choice([0, 1, rng.randint(1, 9), rng.randint(1, 60)]) for _ in range(count)]
        first = rng.randrange(count)
        docs = list(range(first, rng.randint(first + 1, count)))
        s, e = rng.randint(1, 24), rng.choice([1, 1, 0])
        if sum(lengths[d] for d in docs) <= s + e:
            lengths[docs[0]] += s + e + 1
        n = rng.choice([None, rng.randint(1, 10), rng.randint(1, 200)])
        drop_last = rng.random() < 0.8
        seed = rng.choice([0, 1234, rng.randrange(2**32)])
        want = slow(lengths, docs, s, n, seed, e, drop_last)
        found = megatron.indices(np.array(lengths, np.int32), np.array(docs, np.int32), s, n, seed, e, drop_last)
        assert lists(found) == want, (case, lengths, docs, s, n, seed, e, drop_last)
        kinds.add("one" if len(found.document_index) == len(docs) else "many")
        kinds.add("plain" if drop_last else "ragged")
    assert kinds == {"one", "many", "plain", "ragged"}


def test_200_random_blends() -> None:
    rng = random.Random(6)
    for _ in range(200):
        w = [rng.choice([rng.random(), float(rng.randint(1, 9))]) for _ in range(rng.randint(1, 12))]
        size = rng.randint(1, 80)
        once = megatron.normalize(w)
        total = float(np.sum(np.array(once)))
        twice = [x / total for x in once]
        counts, which, number = [0] * len(w), [], []
        for s in range(size):
            best = 0
            for k in range(1, len(w)):
                if twice[k] * max(float(s), 1.0) - counts[k] > twice[best] * max(float(s), 1.0) - counts[best]:
                    best = k
            which.append(best)
            number.append(counts[best])
            counts[best] += 1
        assert lists(megatron.weighted(once, size)) == (which, number)
        sizes = [rng.randint(0, 9) for _ in w] + [1]
        counts, which, number = [0] * len(sizes), [], []
        for s in range(sum(sizes)):
            best = -1
            for k, size_k in enumerate(sizes):
                score = size_k / sum(sizes) * max(float(s), 1.0) - counts[k]
                if counts[k] < size_k and (best < 0 or score > high):  # noqa: F821
                    best, high = k, score  # noqa: F841
            which.append(best)
            number.append(counts[best])
            counts[best] += 1
        assert lists(megatron.exhaustive(sizes)) == (which, number)
    targets, built = megatron.blend_targets([0.3, 0.7], 1001)
    assert targets == [301, 701] and built == [math.ceil(301 * 1.005), math.ceil(701 * 1.005)]
