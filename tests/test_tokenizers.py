"""Tokenizers: each kind against its own library, special tokens, roles, descriptions, and bad files. All files are made here."""

import ast
import inspect
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
import tiktoken
import tiktoken.load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import Tokenizer as HuggingFace
from tokenizers import pre_tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from mtl.data import tokenizers
from mtl.data.tokenizers.byte_level import BORDER
from mtl.errors import UserError
from tests import vocabularies

TEXT = ["Hello world", "", "  two  spaces\r\n\ttabs ", "wörld 日本語 \U0001f642 e\u0301", "it's <|endoftext|> </s> 12345 [SEP]", "a" * 3000]


@pytest.mark.parametrize("text", TEXT)
def test_bytes(text: str) -> None:
    t = tokenizers.load("bytes")
    assert t.encode(text) == list(text.encode())
    assert t.decode(t.encode(text)) == text
    assert (t.vocab_size, t.eod, t.pad) == (257, 256, None)
    assert t.decode([104, 105, 256]) == "hi<eod>"


def test_null() -> None:
    t = tokenizers.load("null", vocab_size=100)
    assert t.encode(" 1 2\n99\t") == [1, 2, 99]
    assert t.encode("") == []
    assert (t.vocab_size, t.eod) == (101, 100)
    for bad in ("1 x", "-1", "100", "1.5", "٣", "9" * 30):
        with pytest.raises(UserError):
            t.encode(bad)


def test_description_says_when_tokenizers_differ(tmp_path: Path) -> None:
    mine = tokenizers.describe(tokenizers.load("null", vocab_size=100, special=["<a>", "<b>"], pad="<pad>"))
    tokenizers.save(mine, tmp_path / "P.tokenizer.json")
    read = tokenizers.read(tmp_path / "P.tokenizer.json")
    assert read == mine
    assert tokenizers.reopen(mine).special == {"<eod>": 100, "<a>": 101, "<b>": 102, "<pad>": 103}
    swapped = tokenizers.describe(tokenizers.load("null", vocab_size=100, special=["<b>", "<a>"], pad="<pad>"))
    assert swapped.fingerprint != mine.fingerprint
    assert "special is" in (mine.differs(swapped) or "")
    said = json.loads((tmp_path / "P.tokenizer.json").read_text())
    (tmp_path / "P.tokenizer.json").write_text(json.dumps({**said, "vocab_size": 5}))
    with pytest.raises(UserError, match="changed by hand"):
        tokenizers.read(tmp_path / "P.tokenizer.json")
    assert tokenizers.read(tmp_path / "none.tokenizer.json") is None


def test_padding_is_never_the_end_of_a_document() -> None:
    with pytest.raises(UserError, match="padding needs a token of its own"):
        tokenizers.load("bytes", pad="<eod>")


def test_marked_text() -> None:
    t = tokenizers.load("bytes", special=["<|im|>", "<|im|>2"])
    assert t.encode_marked("a<|im|>2b<|im|>") == [97, 258, 98, 257]
    assert t.decode(t.encode_marked("a<|im|>2b<|im|>")) == "a<|im|>2b<|im|>"
    assert t.encode("<|im|>") == list(b"<|im|>")


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="Did you mean 'gpt2'"):
        tokenizers.load("gpt")
    with pytest.raises(UserError, match="needs --merges"):
        tokenizers.load("gpt2", vocab="x")
    with pytest.raises(UserError, match="has no use for --vocab"):
        tokenizers.load("bytes", vocab="x")
    with pytest.raises(UserError, match="does not exist"):
        tokenizers.load("sentencepiece", model="nowhere.model")


def gpt2_slowly(text: str, vocab: Path, merges: Path) -> list[int]:
    """GPT-2's published algorithm, step by step, without any tokenizer library."""
    ids = json.loads(vocab.read_text())
    rank = {tuple(line.split()): i for i, line in enumerate(merges.read_text().split("\n")) if line and not line.startswith("#version")}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    found: list[int] = []
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text):
        parts = [letter[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, 10**9))
            if best not in rank:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(parts[i : i + 1 + both]))
                i += 1 + both
            parts = merged
        found += [ids[p] for p in parts]
    return found


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return vocabularies.gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("text", TEXT[:5])
def test_gpt2(gpt2_files: dict[str, Path], text: str) -> None:
    t = tokenizers.load("gpt2", **gpt2_files)
    assert t.encode(text) == gpt2_slowly(text, **gpt2_files)
    assert t.decode(t.encode(text)) == text
    assert t.eod == t.special["<|endoftext|>"] == 0
    assert t.eod not in t.encode(text)
    assert t.encode_marked("a<|endoftext|>b") == [*t.encode("a"), 0, *t.encode("b")]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_gpt2_on_any_text(gpt2_files: dict[str, Path], text: str) -> None:
    t = tokenizers.load("gpt2", **gpt2_files) if "t" not in _kept else _kept["t"]
    _kept["t"] = t
    assert t.encode(text) == gpt2_slowly(text, **gpt2_files)
    assert t.decode(t.encode(text)) == text


def test_many_texts_at_once_are_each_text_alone(gpt2_files: dict[str, Path]) -> None:
    t = tokenizers.load("gpt2", **gpt2_files)
    pieces = ["", " ", "  ", "\n", "a", " b", "'s", BORDER[:-1], BORDER[1:], BORDER[:5], BORDER[5:], "1"]
    draw = random.Random(0)
    for _ in range(200):
        texts = ["".join(draw.choice(pieces) for _ in range(draw.randrange(4))) for _ in range(draw.randrange(8))]
        assert [ids.tolist() for ids in t.encode_batch(texts)] == [gpt2_slowly(text, **gpt2_files) for text in texts], texts


_kept: dict[str, tokenizers.Tokenizer] = {}


@pytest.mark.parametrize("seed", range(30))
def test_gpt2_with_merges_that_no_training_would_make(tmp_path: Path, seed: int) -> None:
    """Ids out of merge order, two merges for one token, merges that never happen: still the listed merges and no others."""
    draw = random.Random(seed)
    letters = list("abc")
    pairs: list[tuple[str, str]] = []
    pieces = [*letters]
    for _ in range(12):
        pair = (draw.choice(pieces), draw.choice(pieces))
        if pair not in pairs:
            pairs.append(pair)
            pieces.append("".join(pair))
    names = list(dict.fromkeys(pieces))
    if seed % 2:
        names += [c for c in tokenizers_byte_names() if c not in names]
    draw.shuffle(names)
    (tmp_path / "v.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (tmp_path / "m.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    t = tokenizers.load("gpt2", vocab=tmp_path / "v.json", merges=tmp_path / "m.txt")
    for _ in range(200):
        text = "".join(draw.choice("abc") for _ in range(draw.randrange(1, 12)))
        assert t.encode(text) == gpt2_slowly(text, tmp_path / "v.json", tmp_path / "m.txt"), text
    if not seed % 2:
        with pytest.raises(UserError, match="no token for byte 0x64"):
            t.encode("abcd")


def tokenizers_byte_names() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def test_sentencepiece(tmp_path: Path) -> None:
    path = vocabularies.sentencepiece_model(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    t = tokenizers.load("sentencepiece", model=path)
    for text in TEXT:
        assert t.encode(text) == own.encode(text)
        assert t.decode(t.encode(text)) == own.decode(own.encode(text))
    assert (t.vocab_size, t.eod, t.bos, t.pad) == (700, own.eos_id(), own.bos_id(), 3)
    assert t.eod not in t.encode("a </s> b")
    assert t.decode([*t.encode("Hello"), t.eod or 0, *t.encode("you")]) == "Hello</s>you"
    more = tokenizers.load("sentencepiece", model=path, special=["<|im_start|>", "</s>"])
    assert more.special["<|im_start|>"] == 700
    assert (more.vocab_size, more.special["</s>"]) == (701, own.eos_id())
    assert tokenizers.load("sentencepiece", model=vocabularies.sentencepiece_model(tmp_path, pad=False)).pad is None


def test_huggingface(tmp_path: Path) -> None:
    path = vocabularies.huggingface(tmp_path)
    own = HuggingFace.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    t = tokenizers.load("huggingface", model=path)
    plain = [text for text in TEXT if "</s>" not in text]
    assert [t.encode(text) for text in plain] == [own.encode(text).ids for text in plain]
    assert [t.decode(t.encode(text)) for text in TEXT] == TEXT
    assert (t.vocab_size, t.special) == (600, {"<s>": 0, "</s>": 1, "<pad>": 2})
    assert (t.eod, t.bos, t.pad) == (1, 0, 2)
    assert 1 not in t.encode("a </s> b")
    assert t.encode_marked("a</s>") == [*t.encode("a"), 1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}, "pad_token": "<pad>"}))
    t = tokenizers.load("huggingface", model=tmp_path)
    assert (t.eod, t.pad) == (2, None)


def test_wordpiece(tmp_path: Path) -> None:
    path = vocabularies.wordpiece(tmp_path)
    text = "The caf\u00e9s: they're bringing 日本 TOYS! [SEP]"
    for kind, lower in (("bert-cased", False), ("bert-uncased", True)):
        own = BertWordPieceTokenizer(vocab=str(path), lowercase=lower)
        t = tokenizers.load(kind, vocab=path)
        pieces = own.encode(text.replace("[SEP]", "x"), add_special_tokens=False).ids
        assert t.encode(text.replace("[SEP]", "x")) == pieces
        assert t.special["[SEP]"] not in t.encode(text)
        assert (t.eod, t.bos, t.pad) == (t.special["[SEP]"], t.special["[CLS]"], 0)
    assert tokenizers.load("bert-cased", vocab=path).encode("The") != tokenizers.load("bert-uncased", vocab=path).encode("The")
    assert tokenizers.load("bert-uncased", vocab=path).encode("CAFÉ") == tokenizers.load("bert-cased", vocab=path).encode("cafe")


def test_tiktoken(tmp_path: Path) -> None:
    path = vocabularies.tiktoken_file(tmp_path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    with pytest.raises(UserError, match="--pattern gpt2"):
        tokenizers.load("tiktoken", model=path)
    for name in ("cl100k", "o200k", "gpt2"):
        published = {"cl100k": openai_public.cl100k_base, "o200k": openai_public.o200k_base, "gpt2": openai_public.r50k_base}
        own = tiktoken.Encoding("x", pat_str=pattern_of(published[name]), mergeable_ranks=ranks, special_tokens={})
        t = tokenizers.load("tiktoken", model=path, pattern=name)
        for text in TEXT:
            assert t.encode(text) == own.encode_ordinary(text), name
            assert t.decode(t.encode(text)) == text
    assert (t.vocab_size, t.eod) == (263, None)
    named = tokenizers.load("tiktoken", model=vocabularies.tiktoken_file(tmp_path, "cl100k_base.tiktoken"), eod="<|end|>")
    assert (named.eod, named.vocab_size) == (263, 264)


def pattern_of(published: Any) -> str:
    """Read a published pattern from the library's source, whose functions would download ranks."""
    source = inspect.getsource(openai_public) if published is openai_public.r50k_base else inspect.getsource(published)
    if published is openai_public.r50k_base:
        return openai_public.r50k_pat_str
    tree = ast.parse(source)
    joined = next((n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "join"), None)
    if joined is not None:
        return "|".join(ast.literal_eval(joined.args[0]))
    return next(v.value for n in ast.walk(tree) if isinstance(n, ast.Dict) for k, v in zip(n.keys, n.values, strict=True)
                if getattr(k, "value", None) == "pat_str")  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "huggingface", "tiktoken", "bert-cased"])
def test_descriptions_open_again(tmp_path: Path, kind: str, gpt2_files: dict[str, Path]) -> None:
    files: dict[str, Any] = {
        "gpt2": lambda: dict(gpt2_files),
        "sentencepiece": lambda: {"model": vocabularies.sentencepiece_model(tmp_path)},
        "huggingface": lambda: {"model": vocabularies.huggingface(tmp_path)},
        "tiktoken": lambda: {"model": vocabularies.tiktoken_file(tmp_path), "pattern": "cl100k"},
        "bert-cased": lambda: {"vocab": vocabularies.wordpiece(tmp_path)},
    }[kind]()
    t = tokenizers.load(kind, special=["<|im_start|>", "<|im_end|>"], pad="<|p|>", **files)
    assert [t.special[n] for n in ("<|im_start|>", "<|im_end|>", "<|p|>")] == list(range(t.vocab_size - 3, t.vocab_size))
    said = tokenizers.describe(t)
    again = tokenizers.reopen(said)
    assert tokenizers.describe(again) == said
    assert [again.encode(x) for x in TEXT] == [t.encode(x) for x in TEXT]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in said.files.values():
        Path(path).rename(moved / Path(path).name)
        with pytest.raises(UserError, match="is gone or has changed"):
            tokenizers.reopen(said)
    assert tokenizers.describe(tokenizers.reopen(said, moved)).fingerprint == said.fingerprint
    for path in said.files.values():
        (moved / Path(path).name).rename(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(["gpt2", "sentencepiece", "huggingface", "tiktoken", "bert-cased"]))
def test_noise_is_no_tokenizer(tmp_path: Path, noise: bytes, kind: str) -> None:
    (tmp_path / "f").write_bytes(noise)
    names = tokenizers.KINDS[kind][1]
    with pytest.raises(UserError):
        tokenizers.load(kind, **dict.fromkeys(names, tmp_path / "f"), **({"pattern": "gpt2"} if kind == "tiktoken" else {}))


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install 'mtl\[data\]'"):
        tokenizers.load("tiktoken", model=vocabularies.tiktoken_file(tmp_path), pattern="gpt2")


def test_ids_outside_the_vocabulary_do_not_decode() -> None:
    with pytest.raises(UserError, match="id 257 lies outside"):
        tokenizers.load("bytes").decode([257])
