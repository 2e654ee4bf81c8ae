"""The stateless order: every token once an epoch, whatever is asked when; documents whole and shuffled; splits; nothing built."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.data import stream as module
from mtl.data.corpus import Joined, Part, Shard, open_corpus, share, split_bounds
from mtl.data.fill_middle import FillMiddle, fill_middle
from mtl.data.samples import Documents
from mtl.data.stream import Reading, Stream
from mtl.errors import UserError
from tests.corpora import numbered, write

LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=25).filter(lambda x: sum(x) > 0)


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(1, 30), st.integers(0, 99), st.sampled_from([1, 3, 64]))
def test_every_token_comes_once_before_any_comes_twice(lengths: list[int], seq_len: int, key: int, neighbours: int) -> None:
    stream = Stream(numbered(lengths), key, "x")
    total = sum(lengths)
    seen: Counter[int] = Counter(dict.fromkeys(range(total), 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NEIGHBOURS", neighbours)
        for index in range(3 * total // seq_len + 2):
            tokens = stream(index, seq_len).tokens.tolist()
            assert len(tokens) == seq_len
            seen.update(tokens)
            if seq_len <= total:
                assert max(seen.values()) - min(seen.values()) <= 1, "at every prefix"
    assert sum(seen.values()) == (3 * total // seq_len + 2) * seq_len


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(1, 30), st.integers(0, 99))
def test_documents_stay_whole_and_targets_follow(lengths: list[int], seq_len: int, key: int) -> None:
    stream = Stream(numbered(lengths), key, "x")
    begins = set(np.cumsum([0, *lengths]).tolist())
    for index in range(2 * sum(lengths) // seq_len + 1):
        sample = stream(index, seq_len)
        pieces = stream.pieces(index, seq_len)
        assert sum(p.stop - p.first for p in pieces) == seq_len + 1
        assert np.array_equal(sample.tokens[1:], sample.targets[:-1])
        for now, after in zip(sample.tokens.tolist(), sample.targets.tolist(), strict=True):
            assert after in begins or after == now + 1
            assert after == now + 1 or now + 1 in begins, "a document is left at its end alone"


def test_a_sample_depends_on_key_and_index_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 400).tolist()
    stream = Stream(numbered(lengths), 7, "x")
    want = [stream(i, 32).tokens for i in range(1200)]
    for i in (1199, 3, 3, 600, 0):
        assert np.array_equal(Stream(numbered(lengths), 7, "x")(i, 32).tokens, want[i])
    other = [Stream(numbered(lengths), 8, "x")(i, 32).tokens for i in range(300)]
    assert sum(np.array_equal(a, b) for a, b in zip(want, other, strict=False)) < 5
    per_epoch = sum(lengths) // 32
    epochs = {tuple(np.concatenate(want[e * per_epoch : e * per_epoch + 50])) for e in range(3)}
    assert len(epochs) == 3, "every epoch has an order of its own"


def test_documents_are_shuffled_among_their_neighbours_and_samples_over_all() -> None:
    lengths = [10] * 20000
    stream = Stream(numbered(lengths), 1, "x")
    firsts = [stream.pieces(i, 40)[0].document for i in range(400)]
    assert max(firsts) > 18000 and min(firsts) < 2000
    assert abs(np.corrcoef(np.arange(400), firsts)[0, 1]) < 0.2
    inside = [[p.document for p in stream.pieces(i, 40)] for i in range(200)]
    assert sum(b == a + 1 for docs in inside for a, b in pairwise(docs)) < 20, "file neighbours are parted"
    assert all(max(docs) - min(docs) <= 2 * 64 * 4 for docs in inside), "and not far apart, for the disk's sake"


def test_joined_corpora_are_one() -> None:
    lengths = [3, 0, 9, 4, 4, 1, 0, 7]
    whole = numbered(lengths)
    parts = Joined([Part(whole.of, 0, 3), Part(whole.of, 3, 3), Part(whole.of, 3, 8)])
    assert (parts.size, parts.documents) == (whole.size, whole.documents)
    assert [parts.start(d) for d in range(9)] == [whole.start(d) for d in range(9)]
    found = [whole.holding(p) for p in range(whole.size)]
    for near in (None, *range(9)):
        assert [parts.holding(p, near) for p in range(whole.size)] == [whole.holding(p, near) for p in range(whole.size)] == found
    for i in range(20):
        assert np.array_equal(Stream(parts, 5, "x")(i, 6).tokens, Stream(whole, 5, "x")(i, 6).tokens)


# ---------------------------------------------------------------- splits and files


def test_splits_are_megatrons() -> None:
    bounds = split_bounds("949,50,1")
    assert [share(1000, b) for b in bounds] == [(0, 949), (949, 999), (999, 1000)]
    assert [share(8, b) for b in split_bounds("969, 30, 1")] == [(0, 8), (8, 8), (8, 8)]
    assert split_bounds("1")[1:] == [None, None] and share(9, None) == (0, 0)
    assert [share(5, b) for b in split_bounds("1,1")[:2]] == [(0, 2), (2, 5)], "round half to even"
    for bad in ("", "a,b", "0,0,0", "1,2,3,4", "-1,2", "1..2,3"):
        with pytest.raises(UserError, match=r"data\.split is"):
            split_bounds(bad)


def test_files_split_by_documents_and_arrays_by_tokens(tmp_path: Path) -> None:
    write(tmp_path / "c", [list(range(i * 10, i * 10 + 5)) for i in range(10)])
    train, valid = (open_corpus(str(tmp_path / "c"), b) for b in split_bounds("8,2")[:2])
    assert (train.documents, train.size, valid.documents, valid.size) == (8, 40, 2, 10)
    assert valid.read(0, 1, 3).tolist() == [81, 82] and valid.holding(5) == 1 and valid.start(2) == 10
    for suffix in (".bin", ".idx"):
        assert open_corpus(str(tmp_path / "c") + suffix).size == 50
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "plain.bin").write_bytes(b"head" + np.arange(100, dtype="<u4").tobytes())
    for name, settings_ in (("a.npy", {}), ("plain.bin", {"dtype": "uint32", "skip_bytes": 4})):
        corpus: Any = open_corpus(str(tmp_path / name), (0.25, 0.75), **settings_)
        assert corpus.size == 50 and corpus.read(0, 0, 3).tolist() == [25, 26, 27]
        assert sorted(np.concatenate([Stream(corpus, 0, "x")(i, 10).tokens for i in range(5)])) == list(range(25, 75))


@pytest.mark.parametrize(
    ("name", "content", "settings_", "message"),
    [
        ("x.npy", b"no array", {}, "cannot be read as a .npy array of tokens"),
        ("x.bin", b"1234", {}, "or --data.dtype"),
        ("x.bin", b"123", {"dtype": "uint16"}, "no whole number of uint16 tokens"),
        ("x.bin", b"1234", {"dtype": "uint12"}, "data.dtype is 'uint12': known are"),
        ("x.bin", b"1234", {"dtype": "uint16", "skip_bytes": 9}, "has 4 bytes: after 9"),
        ("gone", None, {}, "gone.idx does not exist"),
        ("gone.npy", None, {}, "cannot be read: No such file"),
        ("gone.bin", None, {"dtype": "uint16"}, "cannot be read: No such file"),
    ],
)
def test_files_that_are_no_corpus(tmp_path: Path, name: str, content: bytes | None, settings_: dict[str, Any], message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_corpus(str(tmp_path / name), **settings_)


def test_arrays_that_hold_no_tokens(tmp_path: Path) -> None:
    for array in (np.zeros((2, 2), np.int32), np.zeros(3), np.array([{}], dtype=object)):
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        with pytest.raises(UserError, match=r"x\.npy"):
            open_corpus(str(tmp_path / "x.npy"))


def test_ids_outside_the_vocabulary_are_named() -> None:
    stream = Stream(Shard(np.array([1, 2, 300, 4])), 0, "corpus c", Reading(vocab=256))
    with pytest.raises(UserError, match=r"corpus c, document 0: token 2 is 300, but the vocabulary is 0 to 255"):
        stream(0, 4)


# ---------------------------------------------------------------- documents and fill-in-the-middle


def test_documents_of_a_file_are_kept_apart_without_an_end_id() -> None:
    stream = Stream(numbered([4, 6, 5]), 3, "x", Reading(Documents(True, True, True)))
    for index in range(6):
        sample = stream(index, 8)
        place, cuts = 0, []
        for piece in stream.pieces(index, 8):
            cuts.append(place)
            place += piece.stop - piece.first
        assert sample.segments is not None
        want = [sum(c <= s for c in cuts) - 1 for s in range(8)]
        assert sample.segments.tolist() == want
        assert sample.positions.tolist() == [s - cuts[k] for s, k in enumerate(want)]
        assert sample.weights.tolist() == [0.0 if s + 1 in cuts else 1.0 for s in range(8)]


HOW = FillMiddle(1.0, 0.5, 1000, 1001, 1002)


def turned_back(text: Sequence[int]) -> list[int]:
    """Undo fill-in-the-middle by its ids."""
    at = {name: list(text).index(i) for name, i in (("prefix", 1000), ("middle", 1001), ("suffix", 1002))}
    if at["suffix"] == at["prefix"] + 1:  # suffix first: prefix and middle stand together
        return [*text[at["middle"] + 1 :], *text[at["suffix"] + 1 : at["middle"]]]
    return [*text[1 : at["suffix"]], *text[at["middle"] + 1 :], *text[at["suffix"] + 1 : at["middle"]]]


@settings(deadline=None)
@given(st.integers(8, 60), st.integers(0, 10**6))
def test_fill_in_the_middle_keeps_length_and_content(length: int, key: int) -> None:
    text = np.arange(1, length + 1)
    found = fill_middle(text, HOW, None, key, 0)
    assert len(found) == length
    assert turned_back(found.tolist()) == list(range(1, length - 2)), "the suffix lost its last three tokens"
    closed = fill_middle(np.append(text, 0), HOW, 0, key, 0)
    assert closed[-1] == 0 and turned_back(closed[:-1].tolist()) == list(range(1, length - 2))


def test_fill_in_the_middle_by_rates_and_by_sample_alone() -> None:
    text = np.arange(1, 41)
    quiet = FillMiddle(0.0, 0.5, 1000, 1001, 1002)
    half = FillMiddle(0.5, 0.25, 1000, 1001, 1002)
    assert all(np.array_equal(fill_middle(text, quiet, None, key, 0), text) for key in range(50))
    found = [fill_middle(text, half, None, key, 0) for key in range(2000)]
    turned = [f for f in found if 1000 in f]
    assert 900 < len(turned) < 1100
    assert 0.2 < sum(f[1] == 1002 and 1002 in f for f in turned) / len(turned) < 0.32
    assert np.array_equal(fill_middle(text[:7], HOW, None, 0, 0), text[:7])
    stream = Stream(numbered([30, 50, 40, 12]), 3, "x", Reading(Documents(apart=True), HOW))
    want = [stream(i, 48) for i in range(12)]
    assert all(len(s.tokens) == 48 for s in want) and sum(1000 in s.tokens for s in want) > 10
    for i in (11, 0, 5):
        assert np.array_equal(Stream(stream.corpus, 3, "x", stream.reading)(i, 48).tokens, want[i].tokens)
