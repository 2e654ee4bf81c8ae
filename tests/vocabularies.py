"""Small tokenizer files, trained by the tests themselves."""

import base64
import io
import pydoc_data.topics
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [t for _, t in sorted(pydoc_data.topics.topics.items())][:40]


def gpt2(folder: Path, size: int = 1000) -> dict[str, Path]:
    """Train vocab.json and merges.txt in GPT-2's form."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    )
    inner.model.save(str(folder))
    return {"vocab": folder / "vocab.json", "merges": folder / "merges.txt"}


def huggingface(folder: Path, **more: Any) -> Path:
    """Write a tokenizer.json with special tokens, a truncation and a padding that must not be obeyed."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    inner.enable_truncation(8)
    inner.enable_padding(length=8)
    inner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentencepiece_model(folder: Path, pad: bool = True) -> Path:
    """Train a SentencePiece BPE with byte fallback."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for t in TEXT for line in t.split("\n")), model_writer=out, vocab_size=700, model_type="bpe",
        byte_fallback=True, character_coverage=0.99, pad_id=3 if pad else -1, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1,
    )  # fmt: skip
    path = folder / "sp.model"
    path.write_bytes(out.getvalue())
    return path


def wordpiece(folder: Path) -> Path:
    """Write a small BERT vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'"
    pieces = [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
        "the",
        "The",
        "##ing",
        "caf",
        "日",
    ]
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return path


def tiktoken_file(folder: Path, name: str = "small.tiktoken") -> Path:
    """Write ranks: the bytes and a few merges."""
    pieces = [bytes([b]) for b in range(256)] + [b"th", b"in", b" th", b" the", b"ing", b"\r\n", "é".encode()]
    path = folder / name
    path.write_bytes(b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(pieces)))
    return path
