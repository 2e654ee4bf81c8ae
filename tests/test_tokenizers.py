"""Tokenizers: each kind against its own library, special tokens, roles, descriptions, and bad files. All files are made here."""

import json
from pathlib import Path

import pytest

from mtl.data import tokenizers
from mtl.errors import UserError

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
