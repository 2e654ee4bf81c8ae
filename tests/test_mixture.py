"""What --data says, what it opens, and `mtl data order`; bad input names file and line."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.cli.data_order import main as order
from mtl.data import megatron
from mtl.data.dataset import DataSettings, check_vocabulary, data_vocabulary, open_dataset, open_sources
from mtl.data.mixture import read_mixture
from mtl.data.tokenizers import description
from mtl.data.tokenizers.load import load
from mtl.errors import UserError
from tests.corpora import write


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two corpora, the values of one below 1000 and of the other from 1000 on."""
    a = write(tmp_path / "a", [[d] * (5 + d % 7) for d in range(40)])
    b = write(tmp_path / "b", [[1000 + d] * (3 + d % 11) for d in range(60)])
    return a, b


def read(dataset: Any, count: int, seq_len: int) -> list[np.ndarray]:
    return [dataset.samples(i, seq_len).tokens for i in range(count)]


# ---------------------------------------------------------------- words and list files


def test_words(two: tuple[str, str]) -> None:
    a, b = two
    assert [(e.path, e.weight, e.name) for e in read_mixture([a])] == [(a, None, "a")]
    pairs = [(a, Fraction(3, 10)), (b, Fraction(7, 10))]
    assert [(e.path, e.weight) for e in read_mixture([f"0.3 {a} 0.7 {b}"])] == pairs
    assert [(e.path, e.weight) for e in read_mixture(["0.3", a, "0.7", b])] == pairs
    assert [e.weight for e in read_mixture([a, b])] == [None, None]


def test_list_files(two: tuple[str, str], tmp_path: Path) -> None:
    a, b = two
    lines = tmp_path / "list.txt"
    lines.write_text(f"# corpora\n\n0.25 {a} books\n  0.75\tb web  # found beside this file\n")
    assert [(e.weight, e.path, e.name) for e in read_mixture([str(lines)])] == [(Fraction(1, 4), a, "books"), (Fraction(3, 4), b, "web")]
    lines.write_text(f"1 {a}\n2 {b}\n")
    assert [(e.weight, e.name) for e in read_mixture([str(lines)])] == [(1, "a"), (2, "b")]
    lines.write_text(f"{a}\n{b}\n")
    assert [e.weight for e in read_mixture([str(lines)])] == [None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no corpus"),
        (b"# nothing\n", "lists no corpus"),
        (b"0.3 a\nx b c\n", "line 2: 'x b c' is neither"),
        (b"0.3 a\nx b\n", "line 2: 'x' stands where a weight is expected"),
        (b"0.3 a\n0.7 gone\n", "line 2: there is no corpus gone"),
        (b"0.3 a\n-0.7 b\n", "line 2: the weight -0.7 is negative"),
        (b"0 a\n0 b\n", "all weights are 0"),
        (b"0.3 a\nb\n", "some lines have a weight and some have none"),
        (b"nan a\n", "line 1: 'nan' stands where a weight is expected"),
        (b"0.3 a\n\xff\xfe b\n", "byte 6 is no UTF-8 text"),
        (b"0.3 a b c d\n", "line 1: '0.3 a b c d' is neither"),
    ],
)
def test_bad_list_files_name_the_line(two: tuple[str, str], tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_mixture([str(tmp_path / "list.txt")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0.3 {a} 0.7", "has 3 words"),
        ("0.3 {a} x {b}", "'x' stands where a weight"),
        ("-1 {a} 2 {b}", "the weight -1 is negative"),
        ("0 {a} 0 {b}", "all weights are 0"),
        ("0.5 {a} 0.5 gone", r"gone.idx does not exist"),
        ("", "is empty"),
    ],
)
def test_bad_words(two: tuple[str, str], words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_sources(DataSettings((words.format(a=two[0], b=two[1]),)), "train")


@given(st.binary(max_size=200))
def test_any_bytes_as_a_list_file_give_a_message(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list"
        path.write_bytes(content)
        with pytest.raises(UserError):
            open_sources(DataSettings((str(path),)), "train")


# ---------------------------------------------------------------- datasets


def test_splits_share_nothing_and_have_all(two: tuple[str, str]) -> None:
    settings = DataSettings((two[0],), split="6,3,1")
    seen: list[set[int]] = []
    for split in ("train", "valid", "test"):
        found = open_dataset(settings, split, 0, 16, 0, None)
        assert found is not None
        seen.append(set(np.concatenate(read(found, found.sizes["a"] // 16 + 1, 16)).tolist()))
    assert seen == [set(range(24)), set(range(24, 36)), set(range(36, 40))]


def test_own_paths_for_each_split(two: tuple[str, str]) -> None:
    settings = DataSettings(train=(two[0],), valid=(two[1],))
    train, valid = (open_dataset(settings, split, 0, 16, 0, None) for split in ("train", "valid"))
    assert train is not None and train.sizes == {"a": sum(5 + d % 7 for d in range(40))}
    assert valid is not None and min(read(valid, 1, 16)[0]) >= 1000
    assert open_dataset(settings, "test", 0, 16, 0, None) is None


def test_blends_keep_their_weights_and_each_corpus_its_stream(two: tuple[str, str]) -> None:
    a, b = two
    blend, alone = (open_dataset(DataSettings((w,), split="1"), "train", 5, 8, 0, None) for w in (f"0.3 {a} 0.7 {b}", a))
    assert blend is not None and alone is not None
    found = read(blend, 1000, 8)
    which = [int(t[0] >= 1000) for t in found]
    for n in range(1, 1001):
        assert abs(sum(which[:n]) - 0.7 * n) < 1
    assert all(
        np.array_equal(x, y) for x, y in zip([t for t, w in zip(found, which, strict=True) if not w], read(alone, 300, 8), strict=True)
    )
    assert blend.shares == {"a": 0.3, "b": 0.7} and blend.epochs(1000)["a"] == pytest.approx(300 / blend.sizes["a"])
    twice = open_dataset(DataSettings((f"1 {a} 1 {a}",), split="1"), "train", 5, 8, 0, None)
    assert twice is not None and set(twice.sizes) == {"a#0", "a#1"}
    first, second = read(twice, 80, 8)[::2], read(twice, 80, 8)[1::2]
    assert sum(np.array_equal(x, y) for x, y in zip(first, second, strict=True)) < 4, "two copies of a corpus are not in step"


def test_corpora_without_weights_are_one(two: tuple[str, str]) -> None:
    both = open_dataset(DataSettings(two, split="1"), "train", 0, 10, 0, None)
    assert both is not None
    total = sum(both.sizes.values())
    seen = np.concatenate(read(both, total // 10, 10))
    assert len(set(seen.tolist())) == 100, "one epoch has every document"


def test_empty_splits(tmp_path: Path) -> None:
    small = write(tmp_path / "small", [[1, 2, 3]] * 8)
    assert open_dataset(DataSettings((small,)), "valid", 0, 4, 0, None) is None, "the default split of few documents"
    with pytest.raises(UserError, match="has no tokens in split valid of 100,1,0"):
        open_dataset(DataSettings((small,), split="100,1,0"), "valid", 0, 4, 0, None)
    with pytest.raises(UserError, match="has no tokens in split train of 0,1,1"):
        open_dataset(DataSettings((small,), split="0,1,1"), "train", 0, 4, 0, None)
    empty = write(tmp_path / "empty", [])
    with pytest.raises(UserError, match="empty has no tokens in split train"):
        open_dataset(DataSettings((empty,)), "train", 0, 4, 0, None)
    with pytest.raises(UserError, match="are both given"):
        open_dataset(DataSettings((small,), train=(small,)), "train", 0, 4, 0, None)


def test_vocabularies_are_compared(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, [[1, 2, 3]]) for name in "ab")
    description.save(description.describe(load("null", vocab_size=300, eod="<eod>")), description.beside(a))
    check_vocabulary(DataSettings((a,)), 301)
    assert data_vocabulary(DataSettings((a,))) == 301
    with pytest.raises(UserError, match=r"has 301 ids and the model 256 \(--model.vocab\). Give --data.set-vocab"):
        check_vocabulary(DataSettings((a,)), 256)
    with pytest.raises(UserError, match="needs a tokenizer described beside the data"):
        data_vocabulary(DataSettings((b,)))
    description.save(description.describe(load("null", vocab_size=400)), description.beside(b))
    with pytest.raises(UserError, match="were built with different tokenizers"):
        check_vocabulary(DataSettings((a, b)), 1000)
    apart = open_dataset(DataSettings((a,), mask_ends=True, split="1"), "train", 0, 2, 0, 301)
    assert apart is not None and apart.samples.reading.documents.end == 300  # type: ignore[attr-defined]
    for settings, message in (
        (DataSettings((a,), fim_rate=0.5), "needs --data.fim-ids"),
        (DataSettings((a,), fim_rate=1.5), "data.fim-rate is 1.5"),
        (DataSettings((a,), fim_rate=0.5, fim_ids=(1, 2, 301)), "data.fim-ids 1 2 301 lies outside"),
        (DataSettings((a,), end=-1), "data.end -1 lies outside"),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(settings, "train", 0, 2, 0, 301)


def test_fill_in_the_middle_finds_its_tokens_by_name(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [[i % 50 for i in range(40)]] * 20)
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    description.save(description.describe(load("null", vocab_size=50, special=names)), description.beside(a))
    found = open_dataset(DataSettings((a,), fim_rate=1.0), "train", 0, 64, 0, 54)
    assert found is not None
    tokens = np.concatenate(read(found, 8, 64)).tolist()
    assert tokens.count(51) > 8 and abs(tokens.count(51) - tokens.count(53)) <= 8


# ---------------------------------------------------------------- Megatron's order as samples


def text_of(dataset: Any, count: int, seq_len: int) -> list[list[int]]:
    samples = [dataset.samples(i, seq_len) for i in range(count)]
    return [[*s.tokens.tolist(), int(s.targets[-1])] for s in samples]


def test_megatron_samples_are_its_tokens(two: tuple[str, str]) -> None:
    """The text of a sample is read token by token out of the documents in the order of the indices."""
    found = open_dataset(DataSettings((two[1],), order="megatron", split="8,2"), "train", 1234, 12, 70, None)
    assert found is not None
    lengths, documents = np.array([3 + d % 11 for d in range(60)], np.int32), np.arange(48, dtype=np.int32)
    built = megatron.indices(lengths, documents, 12, 70, 1234)
    line = [1000 + d for d in built.document_index.tolist() for _ in range(lengths[d])]
    for text, row in zip(text_of(found, 70, 12), built.shuffle_index.tolist(), strict=False):
        assert text == line[row * 12 : row * 12 + 13]


def test_megatron_blends_and_refusals(two: tuple[str, str], tmp_path: Path) -> None:
    a, b = two
    found = open_dataset(DataSettings((f"30 {a} 70 {b}",), order="megatron"), "train", 1, 8, 12, None)
    assert found is not None
    assert [int(t[0] >= 1000) for t in read(found, 12, 8)] == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
    with pytest.raises(UserError, match="corpora without weights are seen once"):
        open_dataset(DataSettings((a, b), order="megatron"), "train", 1, 8, 10**4, None)
    with pytest.raises(UserError, match="built for sequences of 8 tokens, not 9"):
        found.samples(0, 9)
    np.save(tmp_path / "x.npy", np.arange(99))
    with pytest.raises(UserError, match=r"reads .bin/.idx corpora alone: x.npy"):
        open_dataset(DataSettings((str(tmp_path / "x.npy"),), order="megatron"), "train", 1, 8, 3, None)


# ---------------------------------------------------------------- mtl data order


def test_megatron_blends_that_ask_for_more_than_was_built_are_refused(tmp_path: Path) -> None:
    """Rounding gives the second corpus 83 of 106 samples; its builder makes the 81 that 100 samples come to, and refuses too."""
    small = [write(tmp_path / f"c{i}", [[0] * 3, [0] * 5]) for i in range(9)]
    weights = [0.1, 0.3, 7, 0.3, 0.3, 0.3, 0.1, 0.3, 0.14855089612643269]
    words = [word for pair in zip(map(str, weights), small, strict=True) for word in pair]
    with pytest.raises(UserError, match=r"takes 83 samples of corpus .*, but Megatron-LM's order builds 81"):
        order(["--data", *words, "--samples", "100", "--seq-len", "7", "--order", "megatron", "--split", "1,0,0"])


def test_order_command_prints_known_indices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "known", [[0] * n for n in [5, 3, 7, 2, 6, 4, 9, 1]])
    flags = ["--samples", "9", "--seq-len", "4", "--seed", "1234", "--split", "6,1,1", "--order", "megatron", "--json"]
    order(["--data", path, *flags])
    found = json.loads(capsys.readouterr().out)
    assert found["document_index"] == [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1]
    assert found["shuffle_index"] == [1, 0, 3, 2, 5, 4, 8, 9, 11, 7, 10, 12, 6]
    assert found["sample_index"][-2:] == [[10, 1], [11, 1]] and found["documents"] == [0, 6]
    order(["--data", f"30 {path} 70 {path}", *flags])
    blended = json.loads(capsys.readouterr().out)
    assert blended["dataset_index"] == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1] and len(blended["datasets"]) == 2
    assert blended["dataset_sample_index"] == [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]
    order(["--data", f"30 {path} 70 {path}", *flags[:-1]])
    assert "dataset_index: [1, 0, 1, 1" in capsys.readouterr().out


def test_order_command_shows_the_stateless_order(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two
    order(
        ["--data", f"0.5 {a} 0.5 {b}", "--samples", "30", "--seq-len", "16", "--seed", "3", "--split", "0,1,0", "--part", "valid", "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert len(found["samples"]) == 30 and {s["corpus"] for s in found["samples"]} == {0, 1}
    settings = DataSettings((f"0.5 {a} 0.5 {b}",), split="0,1,0")
    dataset = open_dataset(settings, "valid", 3, 16, 0, None)
    assert dataset is not None
    for sample, tokens in zip(found["samples"], read(dataset, 30, 16), strict=True):
        told = [1000 * sample["corpus"] + d for d, first, stop in sample["pieces"] for _ in range(first, stop)]
        assert told[:-1] == tokens.tolist(), "the command tells what a run reads"
    order(["--data", a, b, "--samples", "3", "--seq-len", "16"])
    assert "corpora a+b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples is 0"),
        (["--seq-len", "0"], "--seq-len is 0"),
        (["--order", "megatron", "--seed", "-1"], "--seed is -1"),
        ([], "--samples is missing"),
        (["--samples", "2", "--part", "test", "--split", "1"], "has no tokens in split test"),
    ],
)
def test_order_command_refuses(two: tuple[str, str], flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        order(["--data", two[0], "--seq-len", "4", *flags])
