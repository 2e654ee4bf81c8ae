"""Tokenizers without files: the bytes of UTF-8, and numbers parted by spaces."""

from collections.abc import Sequence

import numpy as np

from mtl.data.tokenizers.vocabulary import Flat, Ids, Vocabulary, flatten
from mtl.errors import UserError

END = "<eod>"


def open_bytes() -> Vocabulary:
    """Ids 0..255 are bytes, 256 ends a document."""

    def encode(texts: Sequence[str]) -> Flat:
        parts = [text.encode("utf-8") for text in texts]
        return np.frombuffer(b"".join(parts), dtype=np.uint8), np.array([len(p) for p in parts], dtype=np.int64)

    return Vocabulary(257, encode, lambda ids: bytes(ids).decode("utf-8", "replace"), {END: 256}, {"eod": END})


def open_null(vocab_size: int) -> Vocabulary:
    """Text is numbers 0..vocab_size-1 parted by spaces; vocab_size itself ends a document (as Megatron's NullTokenizer has it)."""
    if not 1 <= vocab_size < 2**31 - 1:
        raise UserError(f"--vocab-size is {vocab_size}: it must be from 1 to {2**31 - 2}.")

    def encode(texts: Sequence[str]) -> Flat:
        return flatten(_numbers(text, vocab_size) for text in texts)

    return Vocabulary(vocab_size + 1, encode, lambda ids: " ".join(map(str, ids)), {END: vocab_size}, {"eod": END})


def _numbers(text: str, vocab_size: int) -> Ids:
    words = text.split()
    if not all(w.isascii() and w.isdigit() for w in words):
        bad = next(w for w in words if not (w.isascii() and w.isdigit()))
        raise UserError(f"{bad[:40]!r} is no number from 0 to {vocab_size - 1}: tokenizer null takes ids parted by spaces.")
    if any(len(w) > 18 for w in words):
        raise UserError(f"a number of more than 18 digits is no id of the vocabulary (0 to {vocab_size - 1}).")
    ids = np.array(words, dtype=np.int64)
    if ids.size and ids.max() >= vocab_size:
        raise UserError(f"id {ids.max()} lies outside the vocabulary (0 to {vocab_size - 1}, --vocab-size {vocab_size}).")
    return ids
